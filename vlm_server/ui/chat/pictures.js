/** What may be sent as a picture: the formats and sizes that the server takes. What is refused is refused with a sentence that names it. */

import { element, newId } from "./dom.js";

const FORMATS = "JPEG, PNG, GIF, WebP, BMP, TIFF or AVIF";
const TYPES = {
  jpg: "image/jpeg",
  jpeg: "image/jpeg",
  png: "image/png",
  gif: "image/gif",
  webp: "image/webp",
  bmp: "image/bmp",
  tif: "image/tiff",
  tiff: "image/tiff",
  avif: "image/avif",
};
const NOT_SHOWN = "image/tiff"; // by most browsers; the server reads it

/** `{id, name, type, size, blob}` of a file. Rejects with an Error whose message is for the user. */
export async function pictureOf(file, limits) {
  const name = file.name || "Pasted picture";
  const type = Object.values(TYPES).includes(file.type) ? file.type : TYPES[name.split(".").pop().toLowerCase()];
  if (!type || (file.type && !file.type.startsWith("image/")))
    throw new Error(`“${name}” is not a picture that can be sent, only ${FORMATS}.`);
  if (file.size > limits.max_picture_bytes) {
    throw new Error(
      `“${name}” has ${bytes(file.size)}; the server takes pictures up to ${bytes(limits.max_picture_bytes)}.`,
    );
  }
  const blob = new Blob([await file.arrayBuffer()], { type }); // the file itself may change or vanish
  if (type !== NOT_SHOWN) await check(blob, name, limits);
  return { id: newId(), name, type, size: blob.size, blob };
}

/** The pictures among what was dropped or pasted. */
export const filesOf = (transfer) => [...(transfer?.files ?? [])];

export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** The picture as an element; its name where the browser cannot show it. */
export function pictureElement(picture, blob) {
  const fallback = () =>
    element("span", { class: "no-picture", role: "img", "aria-label": picture.name }, picture.name);
  if (!blob) return fallback();
  const image = element("img", { alt: picture.name, src: URL.createObjectURL(blob) });
  image.draggable = false; // dropped on this very page it would be added once more
  image.addEventListener("load", () => URL.revokeObjectURL(image.src), { once: true });
  image.addEventListener("error", () => image.replaceWith(fallback()), { once: true });
  return image;
}

export function bytes(count) {
  return count < 1 << 20 ? `${Math.ceil(count / 1024)} KB` : `${(count / (1 << 20)).toFixed(1)} MB`;
}

async function check(blob, name, limits) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    throw new Error(`“${name}” cannot be read as a picture.`);
  }
  const pixels = bitmap.width * bitmap.height;
  bitmap.close();
  if (pixels > limits.max_picture_pixels) {
    const million = (count) => `${Math.round(count / 1e6)} million pixels`;
    throw new Error(
      `“${name}” has ${million(pixels)}; the server takes pictures up to ${million(limits.max_picture_pixels)}.`,
    );
  }
}
