// One stream of updates for all who look, where the server of the page has one. Plain Server-Sent Events.
Object.assign(labkit, (() => {
  const SILENCE = 40000; // ms, after which the other side is gone: it has a heartbeat every 15 seconds

  // While `root` is looked at, call `take(update)`, with everything first, and `lost(whether)` there is no answer.
  // Where there is no such stream, call `none()`, once, and give up.
  function follow(root, address, { take, lost, none }) {
    let source = null, worked = false, failures = 0, timer = 0;

    function open() {
      source = new EventSource(address);
      source.onmessage = (event) => {
        live();
        take(JSON.parse(event.data));
      };
      source.addEventListener("beat", live);
      source.onerror = fail;
      wait(fail, SILENCE);
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

    function live() {
      [worked, failures] = [true, 0];
      lost(false);
      wait(fail, SILENCE);
    }

    function fail() {
      const { readyState } = source;
      if (readyState === EventSource.CLOSED && !worked) {
        stop();
        return none();
      }
      lost(true);
      if (readyState === EventSource.CONNECTING) return; // it tries again by itself
      close();
      wait(tune, Math.min(30000, 1000 * 2 ** failures));
      failures += 1;
    }

    // A tab that is hidden, or behind another tab of the page, is not looked at: it gets everything when it is shown.
    function tune() {
      const looking = root.isConnected && !document.hidden && root.offsetParent;
      if (!looking) close();
      else if (!source) open();
    }

    function stop() {
      close();
      sight.disconnect();
      document.removeEventListener("visibilitychange", tune);
    }

    const sight = new ResizeObserver(tune);
    sight.observe(root); // which calls `tune` for the first time
    document.addEventListener("visibilitychange", tune);
  }

  return { follow };
})());
