// Make of a picture file what Python's processor makes of it: upright, on white, in RGB, resized as Pillow resizes.
// A canvas would resize in another way in every browser; this gives the same pixels everywhere.

export const MOST_BYTES = 20e6;
export const MOST_PIXELS = 50e6;
const BITS = 22; // Pillow's weights are integers with this many binary places

const sinc = (x) => (x ? Math.sin(Math.PI * x) / (Math.PI * x) : 1);
const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2);
// Pillow's number of a filter -> its reach and its weight at a distance. processor_config.json names it `resample`.
export const FILTERS = {
  1: { reach: 3, weight: (x) => sinc(x) * sinc(x / 3) },
  2: { reach: 1, weight: (x) => 1 - x },
  3: { reach: 2, weight: cubic },
};

/** Decode a file to RGB, `{data, width, height}`; throw Error("kind") or Error("large") for what cannot be shown. */
export async function decode(file) {
  if (file.size > MOST_BYTES) throw new Error("large");
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options).catch(() => {
    throw new Error("kind");
  });
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) throw new Error("large");
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8ClampedArray(width * height * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    data[to++] = rgba[from];
    data[to++] = rgba[from + 1];
    data[to++] = rgba[from + 2];
  }
  return { data, width, height };
}

/** Resize an RGB picture with the arithmetic of Pillow's Image.resize: one side after the other, in 8 bits each. */
export function resize(picture, width, height, filter) {
  const lost = picture.height - height;
  const heightFirst = lost > 0 && lost > 2 * (picture.width - width); // so does Pillow 13, to save time
  if (heightFirst) picture = pass(picture, height, false, filter);
  picture = pass(picture, width, true, filter);
  return pass(picture, height, false, filter);
}

/** Resize along one side, unless it has the wanted size already. */
function pass(picture, size, horizontal, filter) {
  if (size === (horizontal ? picture.width : picture.height)) return picture;
  const from = horizontal ? picture.width : picture.height;
  const weights = coefficients(from, size, filter);
  const width = horizontal ? size : picture.width;
  const height = horizontal ? picture.height : size;
  const data = new Uint8ClampedArray(width * height * 3);
  const step = 3 * (horizontal ? 1 : picture.width); // from one source pixel of a sum to the next
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const { start, values } = weights[horizontal ? x : y];
      const corner = horizontal ? 3 * (y * picture.width + start) : 3 * (start * picture.width + x);
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (BITS - 1);
        for (let i = 0, at = corner + channel; i < values.length; i++, at += step) sum += picture.data[at] * values[i];
        data[to++] = sum >> BITS; // clamped to 0 and 255
      }
    }
  }
  return { data, width, height };
}

/** Return for each place of the new side where its sum starts, and the weights of the sum. */
function coefficients(from, size, { reach, weight }) {
  const scale = from / size;
  const stretch = Math.max(scale, 1); // a picture that shrinks is averaged over all that falls on a place
  return Array.from({ length: size }, (_, place) => {
    const center = (place + 0.5) * scale;
    const start = Math.max(Math.trunc(center - reach * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach * stretch + 0.5), from);
    const values = [];
    for (let i = start; i < end; i++) {
      const distance = Math.abs((i - center + 0.5) / stretch);
      values.push(distance < reach ? weight(distance) : 0);
    }
    const total = values.reduce((sum, value) => sum + value, 0);
    return { start, values: values.map((value) => fixed(total ? value / total : value)) };
  });
}

/** Return a weight with `BITS` binary places, rounded to the nearest. */
function fixed(value) {
  return Math.trunc((value < 0 ? -0.5 : 0.5) + value * 2 ** BITS);
}
