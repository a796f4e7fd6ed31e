// Write, ask, forget, undo: each a request to the API of this server, and to nothing else.

const at = (id) => document.getElementById(id);
let model = "";
let asking = new AbortController();
let matched = null;
let names = [];

const memory = () => at("memory").value.trim() || "default";
const path = (rest) => `/v1/memories/${encodeURIComponent(memory())}/${rest}`;
const modelName = () => (memory() === "default" ? model : `${model}:${memory()}`);

function say(text, isFault = false) {
  at("status").textContent = text;
  at("status").classList.toggle("fault", isFault);
}

async function send(method, url, body, signal) {
  const options = { method, signal };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "Content-Type": "application/json" };
  }
  const response = await fetch(url, options);
  if (response.ok) return response;
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = text || response.statusText;
  }
  throw Object.assign(new Error(message), { status: response.status });
}

// Run what a person started, and show why it failed if it did.
async function attempt(work, button) {
  if (button) button.disabled = true;
  try {
    await work();
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  } finally {
    if (button) button.disabled = false;
  }
}

function element(tag, text) {
  const node = document.createElement(tag);
  node.textContent = text;
  return node;
}

function factRow(fact) {
  const row = document.createElement("li");
  row.dataset.fact = fact.id;
  row.classList.toggle("matched", fact.id === matched);
  const text = document.createElement("div");
  text.append(`${fact.id}. ${fact.prompt} `, element("strong", fact.answer));
  const origin = Object.entries(fact.source).map(([name, value]) => `${name}: ${value}`);
  const notes = [fact.at.slice(0, 16).replace("T", " "), fact.note, ...origin];
  const note = element("p", notes.filter(Boolean).join(" · "));
  note.className = "note";
  text.append(note);
  const button = element("button", "Forget");
  button.type = "button";
  button.setAttribute("aria-label", `Forget fact ${fact.id}: ${fact.prompt} ${fact.answer}`);
  button.addEventListener("click", () => attempt(() => forget(fact), button));
  row.append(text, button);
  return row;
}

async function refresh() {
  await listMemories();
  if (!names.includes(memory())) {
    at("facts").replaceChildren();
    at("total").textContent = "(0)";
    at("load").value = 0;
    at("health").textContent = "A new memory: the first fact makes it.";
    return;
  }
  const query = new URLSearchParams({ q: at("search").value, limit: 1000 });
  const [facts, health] = await Promise.all(
    [path(`facts?${query}`), path("health")].map(async (url) => (await send("GET", url)).json()),
  );
  at("facts").replaceChildren(...facts.data.map(factRow).reverse());
  at("total").textContent = `(${facts.total})`;
  at("more").textContent = facts.has_more ? "More than these match: search for some words." : "";
  at("load").value = health.load ?? 1;
  const percent = (value) => (value === null ? "–" : `${(100 * value).toFixed(1)} %`);
  const condition = health.condition === null ? "–" : health.condition.toExponential(1);
  at("health").textContent =
    `${health.facts} facts in ${health.slots} slots; load ${percent(health.load)}; expected error ` +
    `${percent(health.error)}; condition ${condition}${health.full ? "; full" : ""}`;
}

async function listMemories() {
  const { data } = await (await send("GET", "/v1/models")).json();
  const ids = data.map(({ id }) => id.split(":"));
  model = ids[0]?.[0] ?? "smol";
  names = ids.map(([, name]) => name ?? "default");
  at("memories").replaceChildren(
    ...names.map((value) => Object.assign(document.createElement("option"), { value })),
  );
}

async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk.choices[0];
    }
  }
}

async function stream(text, withMemory, signal, onChoice) {
  const isChat = at("chat").checked;
  const body = { model: modelName(), stream: true, memory: withMemory };
  if (isChat) Object.assign(body, { messages: [{ role: "user", content: text }], max_tokens: 64 });
  else Object.assign(body, { prompt: text, stop: ["\n"] });
  const url = isChat ? "/v1/chat/completions" : "/v1/completions";
  const output = at(withMemory ? "with" : "without");
  output.textContent = "";
  for await (const choice of chunks(await send("POST", url, body, signal))) {
    output.textContent = (output.textContent + (isChat ? choice.delta.content : choice.text)).trimStart();
    if (choice.larimar) onChoice?.(choice.larimar);
  }
}

function showMatch({ in_scope, fact, score }) {
  const near = score > -1 ? `; its nearest prompt has cosine ${score.toFixed(3)}` : "";
  at("match").textContent = in_scope ? `from fact ${fact}, cosine ${score.toFixed(3)}` : `nothing written applies${near}`;
  matched = in_scope ? fact : null;
  for (const row of at("facts").children) {
    const isMatched = row.classList.toggle("matched", row.dataset.fact === String(matched));
    if (isMatched) at("facts").scrollTop = row.offsetTop;
  }
}

async function ask() {
  asking.abort();
  asking = new AbortController();
  at("match").textContent = "";
  say("");
  const text = at("question").value;
  await Promise.all([
    stream(text, true, asking.signal, showMatch),
    stream(text, false, asking.signal),
  ]);
}

async function write() {
  const fact = { prompt: at("prompt").value, answer: at("answer").value };
  if (at("source").value.trim()) fact.source = { from: at("source").value.trim() };
  const { data } = await (await send("POST", path("facts"), fact)).json();
  say(`Fact ${data[0].id} is written${data[0].note ? `: ${data[0].note}` : ""}.`);
  at("write").reset();
  at("question").focus();
  await refresh();
}

async function forget(fact) {
  const { certificate } = await (await send("DELETE", path(`facts/${fact.id}`))).json();
  const distance = certificate.distance === null ? "–" : certificate.distance.toExponential(0);
  say(`Fact ${fact.id} is forgotten: the memory is ${distance} from one that never had it.`);
  await refresh();
}

async function undo() {
  const { forgotten, written } = await (await send("POST", path("undo"), { changes: 1 })).json();
  const parts = [];
  if (forgotten.length) parts.push(`forgotten again: ${forgotten.join(", ")}`);
  if (written.length) parts.push(`back: ${written.map(({ id, prompt, answer }) => `${id}. ${prompt} ${answer}`).join(", ")}`);
  say(`Undone; ${parts.join("; ") || "nothing differs"}.`);
  await refresh();
}

function submitted(id, work) {
  at(id).addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(work, at(id).querySelector("button"));
  });
}

submitted("ask", ask);
submitted("write", write);
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  at("ask").requestSubmit();
});
at("undo").addEventListener("click", () => attempt(undo, at("undo")));
at("memory").addEventListener("change", () => attempt(refresh));
let typing = 0;
at("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => attempt(refresh), 200);
});
attempt(refresh);
