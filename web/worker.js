// Hold the model, and answer questions about the picture that was given last. The page stays free meanwhile.
//
// In:  {type: "picture", file, number}, {type: "ask", question, sample, number}, {type: "stop"}
// Out: {type: "progress", share}, {type: "ready"}, {type: "picture", number}, {type: "text", text, number},
//      {type: "done", number, ids, stopped, first, all}, {type: "error", reason, number}
// `number` is that of the request; `first` and `all` are milliseconds until the first token and until the end.
import { decode, FILTERS, resize } from "./pictures.js";

const MOST_TOKENS = 128;
const here = new URL("./", import.meta.url);
let settings;
let loaded = 0; // bytes
let picture;
let stopping;

/** Pass a response on, and tell the page how much of everything has arrived. */
function counted(response) {
  const count = new TransformStream({
    transform(chunk, controller) {
      loaded += chunk.length;
      postMessage({ type: "progress", share: Math.min(loaded / settings.bytes, 1) });
      controller.enqueue(chunk);
    },
  });
  const { status, headers } = response;
  return response.body ? new Response(response.body.pipeThrough(count), { status, headers }) : response;
}

/** Fetch a file of a library; one that is not bit for bit the expected one is an error. */
async function library(name) {
  const { url, integrity } = settings.library[name];
  const response = await fetch(new URL(url, here), { integrity, credentials: "omit" });
  if (!response.ok) throw new Error(`${response.status} ${response.url}`);
  return counted(response);
}

/** Return the address of a script whose digest was checked; an import by its own address would not check it. */
async function script(name) {
  return URL.createObjectURL(new Blob([await (await library(name)).text()], { type: "text/javascript" }));
}

/** Load library and model as settings.json says; return them. */
async function load() {
  settings = await (await fetch(new URL("settings.json", here))).json();
  const [main, factory, wasm] = await Promise.all([
    script("transformers.min.js"),
    script("ort-wasm-simd-threaded.mjs"),
    library("ort-wasm-simd-threaded.wasm").then((response) => response.arrayBuffer()),
  ]);
  const js = await import(main);
  Object.assign(js.env, {
    allowLocalModels: true,
    allowRemoteModels: false,
    localModelPath: "./", // with an address it would not look for a tokenizer
    useBrowserCache: false, // it keeps an old model under the address of a new one; the HTTP cache asks
    useWasmCache: false,
    fetch: async (path, options) => counted(await fetch(new URL(path, here), options)),
  });
  // One thread: more need headers that static servers rarely send, and a model this small gains little from them.
  Object.assign(js.env.backends.onnx.wasm, { wasmPaths: { mjs: factory }, wasmBinary: wasm, numThreads: 1 });
  const processor = await js.AutoProcessor.from_pretrained("model");
  const model = await js.AutoModelForImageTextToText.from_pretrained("model", { device: "wasm" });
  // WASM never yields by itself: let the message "stop" in before each token.
  const forward = model.forward.bind(model);
  const { port1, port2 } = new MessageChannel();
  model.forward = async (inputs) => {
    await new Promise((resolve) => {
      port1.onmessage = resolve;
      port2.postMessage(null);
    });
    return forward(inputs);
  };
  return { js, processor, model };
}

/** Keep a picture as the model's processor wants it: of its size, unless it crops, which it does by itself. */
async function take(file) {
  const { processor, js } = await ready;
  const { size, resample, do_center_crop: crops } = processor.image_processor.config;
  let { data, width, height } = await decode(file);
  if (size?.width && size?.height && !crops && FILTERS[resample]) {
    ({ data, width, height } = resize({ data, width, height }, size.width, size.height, FILTERS[resample]));
  }
  picture = new js.RawImage(data, width, height, 3);
}

/** Answer a question; the text goes to the page in pieces. */
async function answer(question, sample, number) {
  const { js, processor, model } = await ready;
  const begin = performance.now();
  // A space breaks control tokens that somebody types, such as <|im_end|>: they are text here.
  const text = question.replace(/<(?=[^<>\s]+>)/g, "< ");
  const content = [{ type: "image" }, { type: "text", text }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  // As in Python: a template that writes the begin of a sequence itself gets no second one from the tokenizer.
  const begun = prompt.startsWith(processor.tokenizer.bos_token || prompt);
  const inputs = await processor(picture, prompt, { add_special_tokens: !begun });
  let first = 0;
  const ids = [];
  const streamer = new js.TextStreamer(processor.tokenizer, {
    skip_prompt: true,
    callback_function: (piece) => postMessage({ type: "text", text: piece, number }),
    token_callback_function: (tokens) => {
      first ||= performance.now() - begin;
      ids.push(...tokens.map(Number));
    },
  });
  stopping = new js.InterruptableStoppingCriteria();
  const decoding = sample ? { do_sample: true, temperature: 0.7 } : { do_sample: false };
  await model.generate({
    ...inputs,
    ...decoding,
    max_new_tokens: MOST_TOKENS,
    stopping_criteria: stopping,
    streamer,
  });
  postMessage({ type: "done", number, ids, stopped: stopping.interrupted, first, all: performance.now() - begin });
}

const ready = load();
ready.then(
  () => postMessage({ type: "ready" }),
  (error) => postMessage({ type: "error", reason: String(error), fatal: true }),
);

let queue = Promise.resolve(); // one thing at a time
addEventListener("message", ({ data }) => {
  if (data.type === "stop") return stopping?.interrupt();
  queue = queue.then(async () => {
    try {
      if (data.type === "picture") {
        picture = undefined;
        await take(data.file);
        postMessage({ type: "picture", number: data.number });
      } else if (picture) {
        await answer(data.question, data.sample, data.number);
      } else {
        postMessage({ type: "error", reason: "empty", number: data.number });
      }
    } catch (error) {
      postMessage({ type: "error", reason: error.message, number: data.number });
    }
  });
});
