// Answer questions about pictures greedily with transformers.js, from a local folder and without a network.
// node transformers_js.mjs FOLDER QUESTIONS
// QUESTIONS is a JSON file with a list of {"picture": path or null, "text": ...}. The token ids of the answers are printed.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModelForImageTextToText, AutoProcessor, env, load_image } from "@huggingface/transformers";

const [folder, questions] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const processor = await AutoProcessor.from_pretrained(basename(folder));
const model = await AutoModelForImageTextToText.from_pretrained(basename(folder));

const answers = [];
for (const { picture, text } of JSON.parse(readFileSync(questions, "utf8"))) {
  const content = [...(picture ? [{ type: "image" }] : []), { type: "text", text }];
  const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
  const inputs = picture ? await processor(await load_image(picture), prompt) : processor.tokenizer(prompt);
  const outputs = await model.generate({ ...inputs, max_new_tokens: 24, do_sample: false });
  answers.push(outputs.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number));
}
console.log(JSON.stringify(answers));
