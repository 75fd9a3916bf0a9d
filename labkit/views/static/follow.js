// One stream of updates for all who look, where the server of the page has one. Plain Server-Sent Events.
Object.assign(labkit, (() => {
  const FIRST = 6000; // ms until the first word of a stream, which comes at once
  const SILENCE = 12000; // ms between two words: there is a heartbeat every 5 seconds
  const AGAIN = 60000; // ms after which a stream that did not work is tried once more

  // While `root` is looked at, call `take(update)`, with everything first, and `lost(whether)` there is no answer.
  // A connection alone says nothing: a proxy may hold back what comes through it. `follows(whether)` the stream
  // speaks is called whenever that changes; meanwhile one can ask.
  function follow(root, address, { take, lost, follows }) {
    let source = null, speaks = true, worked = false, resting = false, failures = 0, timer = 0;

    function open() {
      source = new EventSource(address);
      source.onmessage = (event) => {
        live();
        take(JSON.parse(event.data));
      };
      source.addEventListener("beat", live);
      source.onerror = fail;
      wait(silent, FIRST);
    }

    function close() {
      source?.close();
      source = null;
      clearTimeout(timer);
    }

    function wait(act, ms) {
      clearTimeout(timer);
      timer = setTimeout(act, ms);
    }

    function turn(whether) {
      if (speaks === whether) return;
      speaks = whether;
      follows(whether);
    }

    function live() {
      [worked, failures] = [true, 0];
      lost(false);
      turn(true);
      wait(silent, SILENCE);
    }

    function silent() {
      close();
      turn(false);
      resting = true;
      setTimeout(() => {
        resting = false;
        tune();
      }, AGAIN);
    }

    function fail() {
      const closed = source.readyState === EventSource.CLOSED;
      if (!speaks || (closed && !worked)) return silent(); // asking tells whether the other side is there
      lost(true);
      if (!closed) return; // it tries again by itself
      failures += 1;
      if (failures > 2) return silent();
      close();
      wait(tune, 1000 * failures);
    }

    // A tab that is hidden, or behind another tab of the page, is not looked at: it gets everything when it is shown.
    function tune() {
      const looking = root.isConnected && !document.hidden && root.offsetParent;
      if (!looking) close();
      else if (!source && !resting) open();
    }

    new ResizeObserver(tune).observe(root); // which calls `tune` for the first time
    document.addEventListener("visibilitychange", tune);
  }

  return { follow };
})());
