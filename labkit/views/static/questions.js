// Three questions, one click each: two start a race, and one plays a scenario. Measurements answer them, in the
// race's verdict and above the rows of the batch. `?ask=batching` in the address asks one on arrival.
Object.assign(labkit, (() => {
  // `root` holds the buttons; `play(name)` plays a scenario.
  function questions(root, play) {
    // A tab's contents are made when it is opened for the first time.
    function race(course) {
      const button = document.querySelector(`#lkr-ask-${course}`);
      if (button) button.click();
      else if (root.isConnected) requestAnimationFrame(() => race(course));
    }

    function ask({ course, scenario, ask: name }) {
      document.querySelector(`#lk-${course ? "race" : "live"}-tab-button`)?.click();
      if (course) race(course);
      else {
        play(scenario);
        document.querySelector("#lk-live .lk-joins").scrollIntoView({ block: "center" }); // on a small screen
      }
      labkit.address.show({ ask: name });
    }

    const buttons = [...root.querySelectorAll("button")];
    for (const button of buttons) button.addEventListener("click", () => ask(button.dataset));

    // Whoever reloads the page wants to see the answer again, not to have it measured again.
    function fromAddress() {
      const wanted = new URLSearchParams(location.search).get("ask");
      const button = buttons.find(({ dataset }) => dataset.ask === wanted);
      if (button && !labkit.address.reloaded()) ask(button.dataset);
      else if (button?.dataset.course) document.querySelector("#lk-race-tab-button")?.click();
    }

    return { fromAddress };
  }

  return { questions };
})());
