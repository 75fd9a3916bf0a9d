// A trace file of one's own goes to the lab as text, in one call, and is never on the lab's disk.
Object.assign(labkit, (() => {
  const TRIES = 30; // while others' files are read

  const bytes = (file) => new Promise((resolve, reject) => {
    const reader = Object.assign(new FileReader(), { onerror: reject });
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(file);
  });

  // Tell `taken(key, name)` of each file that the lab has read; say what is wrong with the others.
  function handIn(root, most, ask, taken) {
    const [field, line] = ["#lkr-hand-in input", "#lkr-message p"].map((found) => root.querySelector(found));

    async function send(file) {
      const data = file.size > most ? "" : await bytes(file);
      for (let tries = 0; tries < TRIES; tries += 1) {
        const answer = await ask("hand_in", { name: file.name, size: file.size, data });
        if (!answer?.busy) return answer;
        line.textContent = answer.busy;
        await new Promise((resolve) => setTimeout(resolve, 500 + 1000 * Math.random()));
      }
      return null;
    }

    field.onchange = async () => {
      const [file] = field.files;
      if (!file) return;
      line.textContent = "";
      const answer = await send(file).catch(() => ({ error: "The file cannot be read." }));
      field.value = ""; // the same file can be handed in again
      line.textContent = answer ? answer.error || answer.note || "" : "The lab does not answer: try again.";
      if (answer?.key) taken(answer.key, answer.name);
    };
  }

  return { handIn };
})());
