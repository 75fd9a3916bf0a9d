// What the pictures show, in words. Plain functions from the state to text; nothing here touches the page.
Object.assign(labkit, (() => {
  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  const DRAFTS = { ngram: "n-gram drafts", draft: "drafts of a model" };
  const FLAGS = { enable_prefix_caching: "prefix cache", enable_chunked_prefill: "chunked prefill" };

  // One setting of the engine.
  function settingWords(name, value) {
    if (name in FLAGS) return `${value ? "" : "no "}${FLAGS[name]}`;
    const words = { kv_policy: `${value} memory`, num_blocks: count(value ?? 0, "page"), block_size: `pages of ${count(value ?? 0, "token")}`,
                    max_num_seqs: count(value ?? 0, "seat"), max_num_batched_tokens: `${count(value ?? 0, "token")} a step`,
                    scheduler: `${value} batching`, speculative: DRAFTS[value] ?? "no drafts" };
    return words[name];
  }

  // Several settings, as in "64 tokens a step and 4 seats".
  function settingsWords(settings) {
    const words = Object.entries(settings).map(([name, value]) => settingWords(name, value));
    return words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : words.join("");
  }

  // What the engine runs with: words, and whether that was changed since the lab started. Where the `changed` settings
  // are known, with their values, the scheduler stands first and they come next.
  function settings(meta, speculative, changed = null) {
    const where = meta.dtype && `${meta.dtype} on ${meta.device}`;
    const flags = Object.keys(FLAGS).map((name) => [name, changed?.has(name) && settingWords(name, changed.get(name))]);
    const facts = [
      ["", meta.model], ["", where], ["kv_policy", changed?.has("kv_policy") && `${meta.kv_policy} memory`],
      ["num_blocks", `${count(meta.num_blocks, "page")} of ${count(meta.block_size, "token")}`],
      ["max_num_seqs", count(meta.max_num_seqs, "seat")], ["max_num_batched_tokens", `${count(meta.max_num_batched_tokens, "token")} a step`],
      ["scheduler", meta.scheduler], ["speculative", DRAFTS[speculative]], ...flags,
    ].filter(([, words]) => words);
    const isChanged = ([name]) => Boolean(changed?.has(name) || (name === "num_blocks" && changed?.has("block_size")));
    const rank = (fact) => (!changed ? 0 : fact[0] === "scheduler" ? 0 : isChanged(fact) ? 1 : 2);
    return facts.sort((one, other) => rank(one) - rank(other)).map((fact) => [fact[1], isChanged(fact)]);
  }

  // How many requests run and wait now, as their cards say: one that no step has seen yet waits, too.
  function people(state) {
    return { running: state.tables.length, waiting: (labkit.latest(state)?.waiting ?? 0) + state.pending.length };
  }

  // The pictures in a sentence or two, for people who do not see them: of a step that is looked back at, if there is
  // one, or else of now. The sentence says which.
  function summary(state) {
    const now = labkit.latest(state), { meta, past } = state, { running, waiting } = people(state);
    const pool = count(meta.num_blocks, "page");
    const size = count(meta.block_size, "token"), seats = count(meta.max_num_seqs, "seat");
    if (!now && state.busy) return `The first step is being computed: ${running} running, ${waiting} waiting. ${pool} of ${size}; ${seats}.`;
    if (!now) return `Idle. ${pool} of ${size}, all free; ${seats}.`;
    const counts = labkit.kinds(state), row = past ? state.steps.find(({ step }) => step === past.step) : now;
    const parts = [`${counts.owned + counts.shared} of ${pool} in use`];
    if (counts.shared) parts.push(`${counts.shared} shared`);
    if (counts.cached) parts.push(`${counts.cached} cached`);
    const who = past ? `Step ${past.step}, looked back at: ${past.tables.length} ran, ${row?.waiting ?? "some"} waited`
      : `Now, after step ${now.step}: ${running} running, ${waiting} waiting`;
    const why = row?.blocked ? ` Request ${row.blocked.request} ${past ? "waited" : "waits"}: ${row.blocked.reason}.` : "";
    return `${who}, ${parts.join(", ")}.${why}${past ? "" : labkit.farWords(state)}`;
  }

  function blockWords(state, block, { tokens = null, begins = "" } = {}) {
    const kind = labkit.blockKind(state, block), owners = labkit.ownersAt(state, block);
    const size = state.meta.block_size, next = state.past ? undefined : state.plan?.taken.get(block);
    const lines = [`Page ${block}: ${kind === "cached" ? "cached and free" : kind}`];
    for (const { request, position } of owners.slice(0, 6)) {
      lines.push(`request ${request}, page ${position} of its block table`);
    }
    if (owners.length > 6) lines.push(`and ${count(owners.length - 6, "more request")}`);
    const filled = Math.max(0, ...owners.map((owner) => owner.filled));
    if (owners.length) lines.push(`${filled} of ${count(size, "token")} filled`);
    const until = owners.length ? "" : " until someone needs the page";
    if (labkit.isCached(state, block)) lines.push(`in the prefix cache${until}`);
    if (next) lines.push(`the next step gives it to request ${next.request}`);
    if (begins) lines.push(beginsWords(begins));
    if (tokens) lines.push(`“${tokens.join("").replace(/\s+/g, " ").trim()}”`);
    return lines;
  }

  const beginsWords = (begins) => `${begins}, shared: every chat here begins with it`;

  function laneWords(state, lane, step) {
    const lines = [`Request ${lane.request}, step ${step}`];
    for (const span of lane.spans) {
      if (step < span.first || step > span.last) continue;
      const steps = span.first === span.last ? "" : ` since step ${span.first}`;
      const tokens = count(span.tokens, "token");
      if (span.kind === "p") lines.push(`prefill: ${tokens} at once`);
      if (span.kind === "c") lines.push(`a chunk of its prefill: ${tokens}${steps}`);
      const { drafted, accepted } = span;
      if (drafted) lines.push(`decode, ${tokens} computed${steps}: ${labkit.draftWords(drafted, accepted)}`);
      else if (span.kind === "d") lines.push(`decode: ${tokens}${steps}`);
      if (span.kind === "i") lines.push(`idle: holds a seat, computes nothing${steps}`);
      if (span.kind === "x") lines.push(`preempted: gave ${count(span.tokens, "page")} back`);
      if (span.kind === "w") lines.push(`waiting${steps}`);
    }
    const blocked = state.steps.find((row) => row.step === step)?.blocked;
    if (step === state.step) lines.push(...[whyWords(state, lane.request)].filter(Boolean));
    else if (blocked?.request === lane.request) lines.push(`because ${blocked.reason}`);
    if (lane.prompt_tokens) lines.push(`prompt of ${count(lane.prompt_tokens, "token")}`);
    if (lane.ended >= 0 && step >= lane.ended) lines.push(`ended in step ${lane.ended}: ${lane.reason}`);
    return lines;
  }

  function meterWords(state, step) {
    const place = state.steps.findIndex((row) => row.step === step);
    if (place < 0) return [];
    const row = state.steps[place], rate = labkit.rates(state.steps)[place];
    const used = labkit.percent(row.used / state.meta.num_blocks);
    const drafts = row.drafted ? `: ${labkit.draftWords(row.drafted, row.accepted)}` : "";
    return [
      `Step ${step}: ${(row.seconds * 1000).toPrecision(3)} ms`,
      `${count(row.computed, "token")} computed, ${row.sampled} generated${drafts}`,
      `${labkit.short(rate)} tokens/s over the last 8 steps`,
      `${row.used} of ${count(state.meta.num_blocks, "page")} in use (${used})`,
      `${row.running} running, ${row.waiting} waiting`,
      labkit.sentWords(row),
    ].filter(Boolean);
  }

  // Why a request does not run, in a sentence; "" if it runs or is over. While the engine is paused, the plan for
  // the next step knows better than the latest record.
  function whyWords(state, id) {
    const { plan } = state, place = labkit.placeWords(state, id);
    if (place) return place;
    if (plan) {
      const row = plan.rows.find(({ request }) => request === id);
      const queue = plan.queue.map(({ request }) => request);
      if (row && !state.tables.some(({ request }) => request === id)) return `The next step lets it in: ${rowWords(row)}.`;
      if (plan.preempted.some(({ request }) => request === id)) return "The next step takes its pages: older requests need them.";
      if (row) return "";
      return waits(state, id, queue, plan.blocked);
    }
    if (state.tables.some(({ request }) => request === id)) return "";
    return waits(state, id, state.queue, labkit.latest(state)?.blocked);
  }

  function waits(state, id, queue, blocked) {
    if (state.held.has(id)) return `Waits for the prompt of request ${state.held.get(id)}, which it shares.`;
    const place = queue.indexOf(id);
    if (place < 0) return "";
    const lost = state.lanes.get(id)?.spans.findLast((span) => span.kind === "x");
    const before = lost ? `Preempted in step ${lost.first}: its ${count(lost.tokens, "page")} went to older requests. ` : "";
    const { request: head, reason } = blocked ?? { request: queue[0], reason: "the next step decides" };
    if (id === head) return `${before}Waits, first in line: ${reason}.`;
    return `${before}Waits, number ${place + 1} of ${queue.length}. Request ${head} is before it: ${reason}.`;
  }

  const KINDS = { p: "prefill", c: "chunk", d: "decode", i: "idle" };

  // What a row of a batch computes.
  function rowWords({ kind, start, tokens, drafted, accepted }) {
    if (kind === "i") return "idle";
    const drafts = drafted ? `: ${labkit.draftWords(drafted, accepted)}` : "";
    return `${KINDS[kind]}, ${count(tokens, "token")}${kind === "c" ? ` from ${start} on` : ""}${drafts}`;
  }

  // An event of the log.
  function eventWords({ kind, first, second, word }) {
    if (kind === "arrive") return `arrives with a prompt of ${count(first, "token")}`;
    if (kind === "admit") return `gets a seat and ${count(first, "page")}`;
    if (kind === "hit") return `finds ${first} of its ${count(second, "token")} in the prefix cache`;
    if (kind === "preempt") return `is preempted: gives ${count(first, "page")} back`;
    if (kind === "evict") return `${count(first, "cached page")} forgotten to make room`;
    if (kind === "hold") return word;
    if (kind === "unsent") return `waits to be sent to the prefill engine: ${count(first, "prompt token")}`;
    if (kind === "there") return `is sent to the prefill engine: ${count(first, "prompt token")}`;
    if (kind === "arriving") return `its pages leave the prefill engine: ${labkit.size(first)}`;
    if (kind === "threads") return `${count(first, "thread")} from now on: as many cores as other programs leave`;
    if (kind === "return") return `gives ${count(first, "page")} back, because its drafts were wrong`;
    if (kind === "abort") return first ? `is cancelled, and gives ${count(first, "page")} back` : "is cancelled";
    return `ends (${word}), and gives ${count(first, "page")} back`;
  }

  const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(1)} s`);

  // The numbers beside the pictures, as text by name; "–" where nothing was measured.
  function numberWords(state) {
    const now = labkit.latest(state), rate = labkit.rates(state.steps).at(-1), { numbers, meta } = state;
    const busy = state.tables.length || now?.waiting, share = (part) => (part == null ? "–" : labkit.percent(part));
    return {
      rate: busy && rate !== undefined ? labkit.short(rate) : state.busy ? "–" : "idle",
      usage: share(now ? now.used / meta.num_blocks : 0),
      waste: share(now && now.used ? now.wasted / (now.used * meta.block_size) : null),
      ttft: numbers.ttft == null ? "–" : seconds(numbers.ttft),
      itl: numbers.itl == null ? "–" : seconds(numbers.itl),
      hits: share(numbers.hits),
      preemptions: String(numbers.preemptions ?? 0),
      drafts: share(numbers.drafts),
    };
  }

  return { seconds, settings, settingsWords, summary, blockWords, laneWords, meterWords, whyWords, rowWords, eventWords, numberWords, people, beginsWords, count };
})());
