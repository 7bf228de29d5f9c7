// Show what the worker says, and pass on what the user does.
import { EXAMPLES, NAME_QUESTION, SENTENCES } from "./sentences.js";

const element = (id) => document.getElementById(id);
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let state = "load"; // a key of SENTENCES: load, ready or answering
let reason; // of the message that is shown
let last = 0; // number of the newest request
let current; // the entry that is being written: {number, text, row}
const say = (key) => SENTENCES[language][key];

// A worker of its own address would not be bound by the page's Content-Security-Policy; one of a blob inherits it.
const start = `import ${JSON.stringify(new URL("worker.js", document.baseURI).href)};`;
const address = URL.createObjectURL(new Blob([start], { type: "text/javascript" }));
const worker = new Worker(address, { type: "module" });

/** Write everything in the chosen language. */
function speak() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = say(node.dataset.label);
  for (const button of element("examples").children) button.title = button.example[language];
  element("language").textContent = say("other");
  element("language").lang = language === "zh" ? "en" : "zh-CN";
  element("question").placeholder = NAME_QUESTION[language];
  show();
}

/** Show whether the model is loading, idle or answering, and the message if there is one. */
function show() {
  element("status").textContent = say(state);
  element("ask").disabled = state !== "ready";
  element("stop").disabled = state !== "answering";
  element("progress").hidden = state !== "load";
  element("notice").hidden = !reason;
  element("notice").textContent = reason ? (say(reason) ?? say("failed").replace("{}", reason)) : "";
}

function become(next, problem) {
  [state, reason] = [next, problem];
  show();
}

/** Give a file to the worker, which says whether it is a picture. */
function give(file) {
  element("preview").src = URL.createObjectURL(file); // kept: the answers show it, too
  element("preview").hidden = false;
  element("invitation").hidden = true;
  reason = undefined;
  show();
  worker.postMessage({ type: "picture", file, number: ++last });
}

/** Show that there is no picture. */
function empty() {
  element("preview").hidden = true;
  element("invitation").hidden = false;
  element("file").value = "";
}

/** Put the question, or that for the name; without a picture the worker says so. */
function ask() {
  if (state !== "ready") return;
  const question = element("question").value.trim() || NAME_QUESTION[language];
  current = { number: ++last, text: "", question };
  become("answering");
  worker.postMessage({ type: "ask", question, sample: element("sample").checked, number: last });
}

/** Add what was said to the list of answers, newest first. */
function write(piece) {
  if (!current.row) {
    current.row = document.createElement("li");
    const [image, question, answer] = ["img", "p", "p"].map((tag) => document.createElement(tag));
    image.src = element("preview").src;
    image.alt = "";
    question.className = "asked";
    question.textContent = current.question;
    answer.className = "answer";
    current.row.append(image, question, answer);
    element("answers").prepend(current.row);
  }
  current.text += piece;
  current.row.lastChild.textContent = current.text;
}

worker.addEventListener("error", (event) => become("load", event.message || "worker.js"));
worker.addEventListener("message", ({ data }) => {
  if (data.type === "progress") element("progress").value = data.share;
  else if (data.type === "ready") become("ready", reason);
  else if (data.type === "text") write(data.text);
  else if (data.type === "done") {
    write(data.stopped ? ` (${say("stopped")})` : "");
    Object.assign(current.row.dataset, { ids: JSON.stringify(data.ids), first: data.first, all: data.all });
    become("ready");
  } else if (data.type === "error") {
    if (data.reason === "kind" || data.reason === "large") empty();
    become(state === "answering" && data.number === current.number ? "ready" : state, data.reason);
  }
});

element("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  speak();
});
element("file").addEventListener("change", ({ target }) => target.files.length && give(target.files[0]));
element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
element("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
element("stop").addEventListener("click", () => worker.postMessage({ type: "stop" }));
document.addEventListener("paste", ({ clipboardData }) => clipboardData.files.length && give(clipboardData.files[0]));
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // a file that is dropped beside the box would replace the page
    element("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) give(event.dataTransfer.files[0]);
  });
}

/** Add a button for each example picture beside the page. */
async function offer() {
  const { examples } = await (await fetch("settings.json")).json();
  for (const example of EXAMPLES.filter(({ file }) => examples.includes(file))) {
    const [button, image] = [document.createElement("button"), document.createElement("img")];
    image.src = `examples/${example.file}`;
    image.alt = example.file.replace(/\.\w+$/, "").replaceAll("-", " ");
    button.type = "button";
    button.example = example;
    button.append(image);
    button.addEventListener("click", async () => {
      element("question").value = example[language];
      give(await (await fetch(image.src)).blob());
      ask();
    });
    element("examples").append(button);
  }
  element("examples").hidden = !examples.length;
}

speak();
offer().then(speak);
