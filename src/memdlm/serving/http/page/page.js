"use strict";
const at = id => document.getElementById(id);
const between = "\n\n";
// What a pane's prompt shows, and whether the memory is read.
const sources = {
  memory: { words: "the memory alone", memory: true, text: false },
  text: { words: "the text in the prompt", memory: false, text: true },
  both: { words: "the memory, and the text", memory: true, text: true },
  neither: { words: "neither", memory: false, text: false },
};
const texts = new Map();  // texts that were memorised on this page, by memory
let key = "", server = null, running = null, chosen = "";

const show = (where, text) => { where.textContent = text; where.hidden = !text; };
const problem = error => show(at("problem"), error ? String(error.message || error) : "");

const ask = async (path, options = {}) => {
  const headers = { ...(options.headers || {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (reply.ok) return reply;
  const found = await reply.json().catch(() => ({}));
  if (reply.status === 401) at("key-form").hidden = false;
  const error = new Error(found.error ? found.error.message : `The server answered with status ${reply.status}.`);
  error.status = reply.status;
  throw error;
};
const get = async path => (await ask(path)).json();
const post = (path, body, signal) => ask(path, {
  method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
});

// Server-sent events of a reply, one JSON value each.
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
      yield JSON.parse(part.slice(6));
    }
  }
}

// One answer while it is decoded.
class Pane {
  constructor(place) {
    this.place = place;
    this.canvas = at(`canvas-${place}`); this.answer = at(`answer-${place}`); this.cost = at(`cost-${place}`);
  }
  begin(length) {
    this.canvas.replaceChildren(...Array.from({ length }, () => this.cell()));
    this.answer.textContent = ""; this.answer.className = "answer"; this.cost.textContent = "waiting";
    this.steps = 0; this.last = [];
  }
  cell() {
    const cell = document.createElement("span");
    cell.className = "token open"; cell.textContent = "\u00a0\u00a0";
    return cell;
  }
  step(told) {
    this.last.forEach(cell => cell.classList.remove("new", "edited"));
    this.last = [];
    this.steps += 1;
    for (const [place, text] of told.changes) {
      while (this.canvas.children.length <= place) this.canvas.append(this.cell());
      const cell = this.canvas.children[place], wasOpen = cell.classList.contains("open");
      cell.textContent = text || "\u00a0"; cell.title = `step ${this.steps}`;
      cell.className = wasOpen ? "token new" : "token edited";
      this.last.push(cell);
    }
    this.cost.textContent = `step ${this.steps}, block ${told.block + 1}`;
  }
  end(usage, seconds) {
    this.last.forEach(cell => cell.classList.remove("new", "edited"));
    [...this.canvas.children].forEach((cell, place) => { if (place >= usage.completion_tokens) cell.remove(); });
    const spent = `${seconds.toFixed(1)} s`;
    this.cost.textContent =
      `${usage.prompt_tokens} prompt tokens, ${usage.completion_tokens} tokens in ${this.steps} steps, ${spent}`;
    if (!this.answer.textContent) this.answer.textContent = "(an empty answer)";
  }
  fail(error) {
    this.answer.className = "answer bad";
    this.answer.textContent = error.name === "AbortError" ? "Stopped." : error.message;
    this.cost.textContent = "";
  }
}
const panes = [new Pane(0), new Pane(1)];

const answer = async (pane, source, signal) => {
  const start = performance.now(), length = Number(at("length").value) || 64, pace = Number(at("pace").value);
  const memory = source.memory ? at("memory").value : "";
  const question = at("question").value, text = source.text ? at("text").value.trim() : "";
  const prompt = text ? text + between + question : question;
  const body = {
    model: server.model, max_tokens: length, stream: true,
    stream_options: { include_usage: true, include_steps: true },
    ...(memory ? { memory } : {}), ...(pace ? { steps_per_block: pace } : {}),
  };
  pane.begin(length);
  try {
    if (source.memory && !memory) throw new Error("Choose a memory, or write one below.");
    if (source.text && !text) throw new Error("There is no text below that the prompt could show.");
    const [path, asked] = server.has_chat_template
      ? ["v1/chat/completions", { messages: [{ role: "user", content: prompt }] }]
      : ["v1/completions", { prompt }];
    for await (const event of events(await post(path, { ...body, ...asked }, signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.memdlm) pane.step(event.memdlm);
      const choice = event.choices[0];
      if (choice) pane.answer.textContent += server.has_chat_template ? choice.delta.content || "" : choice.text;
      if (event.usage) pane.end(event.usage, (performance.now() - start) / 1000);
    }
  } catch (error) {
    pane.fail(error);
  }
};

const askBoth = async () => {
  if (running) return;
  problem("");
  if (!at("question").value.trim()) { at("question").focus(); problem("Type a question first."); return; }
  running = new AbortController();
  at("stop").disabled = false;
  await Promise.all(panes.map((pane, place) => answer(pane, sources[at(`source-${place}`).value], running.signal)));
  at("stop").disabled = true;
  running = null;
  refresh();
};

const memorise = async () => {
  problem("");
  const file = at("file").files[0], text = at("text").value, name = at("name").value.trim();
  const overwrite = at("overwrite").checked;
  if (!file && !text.trim()) { at("text").focus(); problem("Paste a text first, or choose a file."); return; }
  if (!file && !name) { at("name").focus(); problem("Name the memory first."); return; }
  let reply;
  if (file) {
    const form = new FormData();
    form.append("file", file);
    if (name) form.append("name", name);
    form.append("overwrite", String(overwrite));
    reply = await ask("v1/memories", { method: "POST", body: form });
    if (/^text\//.test(file.type) || /\.(md|txt)$/i.test(file.name)) at("text").value = await file.text();
  } else {
    reply = await post("v1/memories", { name, text, overwrite });
  }
  await follow(await reply.json());
};

const follow = async job => {
  at("job").hidden = false;
  const bar = at("progress");
  while (["queued", "reading", "writing"].includes(job.status)) {
    const { done, total } = job.progress;
    if (total) { bar.max = total; bar.value = done; } else bar.removeAttribute("value");
    at("job-state").textContent = `${job.memory}: ${job.status}` + (total ? `, ${done} of ${total} gradients` : "");
    await new Promise(done => setTimeout(done, 400));
    job = await get(`v1/jobs/${job.id}`);
  }
  bar.max = 1; bar.value = job.status === "done" ? 1 : 0;
  const why = job.error ? `: ${job.error.message}` : job.tokens ? `, ${job.tokens} tokens` : "";
  at("job-state").textContent = `${job.memory}: ${job.status}${why}`;
  if (job.status !== "done") return;
  texts.set(job.memory, at("text").value);
  chosen = job.memory;
  at("file").value = ""; at("name").value = ""; at("overwrite").checked = false;
  await refresh();
};

const listed = memory => {
  const row = document.createElement("tr");
  const cell = (text, kind = "td") => {
    const made = row.appendChild(document.createElement(kind));
    made.textContent = text;
    return made;
  };
  cell(memory.id, "th").scope = "row";
  cell(memory.problem ? "damaged" : memory.served_as.length ? memory.served_as.join(", ") : "no").title = memory.problem || "";
  cell(memory.tokens === undefined ? "" : String(memory.tokens)).className = "number";
  cell(memory.source || "");
  cell((memory.bytes / 1024).toFixed(0)).className = "number";
  const actions = cell(""), button = (words, act) => {
    const made = actions.appendChild(document.createElement("button"));
    made.type = "button"; made.textContent = words;
    made.setAttribute("aria-label", `${words} the memory ${memory.id}`);
    made.onclick = () => act().catch(problem);
  };
  const path = `v1/memories/${encodeURIComponent(memory.id)}`;
  button("Download", async () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await (await ask(`${path}/download`)).blob());
    link.download = `${memory.id}.mem.tar`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  if (!server.read_only) button("Delete", async () => {
    if (!confirm(`Delete the memory ${memory.id}? This cannot be undone.`)) return;
    await ask(path, { method: "DELETE" });
    await refresh();
  });
  return row;
};

const refresh = async () => {
  try {
    server = await get("v1/server");
    at("model").textContent = server.model;
    const { running, waiting, writing, slots, live_memories, memory_bytes } = server.now;
    const loaded = live_memories === 1 ? "1 memory" : `${live_memories} memories`;
    const size = memory_bytes < 2 ** 20 ? `${Math.ceil(memory_bytes / 1024)} KiB` : `${(memory_bytes / 2 ** 20).toFixed(1)} MiB`;
    at("now").textContent = `Answers: ${running} of ${slots} running, ${waiting} jobs waiting. ` +
      `Texts being written: ${writing}. On the device: ${loaded}, ${size}.`;
    at("main").hidden = false; at("key-form").hidden = true;
    at("text-title").parentElement.querySelector("button.main").disabled = server.read_only;
    at("length").max = server.limits.max_tokens;
    const found = server.has_memories ? (await get("v1/memories")).data : [];
    at("memories").hidden = !found.length; at("none").hidden = Boolean(found.length);
    if (!server.has_memories) at("none").textContent = "This server has no memories: memdlm serve --memories FOLDER.";
    at("memories").tBodies[0].replaceChildren(...found.map(listed));
    const names = found.flatMap(memory => memory.problem ? [] : memory.served_as).sort();
    const select = at("memory"), earlier = chosen || select.value;
    select.replaceChildren(...["", ...names].map(name => new Option(name || "(none)", name)));
    select.value = names.includes(earlier) ? earlier : names[0] || "";
    chosen = "";
  } catch (error) {
    if (error.status === 401 && !key) { at("now").textContent = "This server needs its API key."; return; }
    problem(error);
  }
};

for (const place of [0, 1]) {
  at(`source-${place}`).append(...Object.entries(sources).map(([name, source]) => new Option(source.words, name)));
  at(`source-${place}`).value = place ? "text" : "memory";
}
at("ask").onsubmit = event => { event.preventDefault(); askBoth(); };
at("write").onsubmit = event => { event.preventDefault(); memorise().catch(problem); };
at("stop").onclick = () => running && running.abort();
at("key-form").onsubmit = event => {
  event.preventDefault();
  key = at("key").value.trim(); at("key").value = "";
  problem(""); refresh();
};
at("memory").onchange = event => {
  const text = texts.get(event.target.value);
  if (text !== undefined) at("text").value = text;
};
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && running) running.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target !== at("text")) askBoth();
});
refresh();
setInterval(() => { if (!document.hidden && !running && !at("main").hidden) refresh(); }, 10000);
