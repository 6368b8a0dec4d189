"use strict";

const at = (id) => document.getElementById(id);
let models = [];
let running = null; // the AbortController of the answer on its way

function headers() {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function call(path, body, signal) {
  const request = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const response = await fetch(path, { ...request, headers: headers(), signal });
  if (response.ok) return response;
  const failure = await response.json().catch(() => null);
  throw new Error(failure?.error?.message ?? `the server answered ${response.status}`);
}

function model() {
  return models.find((one) => one.id === at("model").value);
}

function messages() {
  const input = at("input").value;
  return [{ role: "user", content: at("instruction").value, ...(input ? { input } : {}) }];
}

function show(error) {
  at("error").textContent = error;
  at("error").hidden = !error;
}

async function loadModels() {
  try {
    models = (await (await call("v1/models")).json()).data;
    show("");
  } catch (error) {
    return show(`${error.message}. A key goes under Settings.`);
  }
  at("model").replaceChildren(...models.map((one) => new Option(one.id, one.id)));
  chosen();
}

function chosen() {
  const chat = model()?.chat ?? true;
  document.querySelector(".chat").hidden = !chat;
  document.querySelector(".raw").hidden = chat;
  at("rendered-section").hidden = !chat;
  at("instruction").required = chat;
  at("prompt").required = !chat;
  render();
}

async function render() {
  if (!at("rendered-section").open || !model()?.chat) return;
  try {
    const found = await (await call("v1/chat/render", { model: model().id, messages: messages() })).json();
    at("rendered").textContent = found.prompt;
    at("template").textContent = found.template;
    at("count").textContent = ` (${found.prompt_tokens} tokens)`;
  } catch (error) {
    show(error.message);
  }
}

// Server-sent events: blocks of lines, an empty line between them. A block may come in several parts.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function send() {
  const chat = model().chat;
  const shared = {
    model: model().id,
    stream: true,
    stream_options: { include_usage: true },
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("tokens").value),
  };
  const body = chat ? { ...shared, messages: messages() } : { ...shared, prompt: at("prompt").value };
  const began = performance.now();
  let reason = null;
  const response = await call(chat ? "v1/chat/completions" : "v1/completions", body, running.signal);
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      at("answer").append(choice.delta?.content ?? choice.text ?? "");
      reason = choice.finish_reason ?? reason;
    }
    if (event.usage) {
      const seconds = (performance.now() - began) / 1000;
      const why = reason === "length" ? ", cut at the longest length" : "";
      at("state").textContent = `${event.usage.completion_tokens} tokens in ${seconds.toFixed(1)} s${why}`;
    }
  }
}

function busy(controller) {
  running = controller;
  at("send").disabled = controller !== null;
  at("stop").disabled = controller === null;
  at("answer").setAttribute("aria-busy", String(controller !== null));
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running || !model()) return;
  show("");
  at("answer").replaceChildren();
  at("state").textContent = "…";
  busy(new AbortController());
  render();
  try {
    await send();
  } catch (error) {
    const stopped = error.name === "AbortError";
    at("state").textContent = stopped ? "stopped" : "";
    if (!stopped) show(error.message);
  }
  busy(null);
});

at("stop").addEventListener("click", () => running?.abort());
at("model").addEventListener("change", chosen);
at("key").addEventListener("change", loadModels);
at("rendered-section").addEventListener("toggle", render);
for (const id of ["instruction", "input"]) at(id).addEventListener("change", render);
loadModels();
