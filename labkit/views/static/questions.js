// Three questions, one click each: two start a race, and one plays a scenario. Measurements answer them, in the
// race's verdict and above the rows of the batch.
Object.assign(labkit, (() => {
  // `root` holds the buttons; `play(name)` plays a scenario.
  function questions(root, play) {
    // A tab's contents are made when it is opened for the first time.
    function race(course) {
      const button = document.querySelector(`#lkr-ask-${course}`);
      if (button) button.click();
      else if (root.isConnected) requestAnimationFrame(() => race(course));
    }

    for (const button of root.querySelectorAll("button")) {
      const { course, scenario } = button.dataset;
      button.addEventListener("click", () => {
        document.querySelector(`#lk-${course ? "race" : "live"}-tab-button`)?.click();
        if (course) return race(course);
        play(scenario);
        document.querySelector("#lk-live .lk-joined").scrollIntoView({ block: "center" }); // on a small screen
      });
    }
  }

  return { questions };
})());
