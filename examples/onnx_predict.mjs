// Classify images with an ONNX file that 'dapt export' wrote, in JavaScript: here under Node, and
// with another way to read pixels, such as a canvas, in a browser too.
//
// npm install onnxruntime-web sharp
// node onnx_predict.mjs photos.onnx new/*.jpg
//
// Images are resized by sharp, not by Pillow: probabilities may differ from those of 'dapt predict'
// by a few percent.

import { readFile } from 'node:fs/promises'
import * as ort from 'onnxruntime-web'
import sharp from 'sharp'

// onnxruntime-web does not hand a file's metadata out. It is field 14 of the protobuf message that
// the file is, an entry each: field 1 is the name, field 2 the text.
function metadataOf(file) {
  const found = {}
  for (const [field, entry] of fieldsOf(file)) {
    if (field !== 14) continue
    const [name, text] = [...fieldsOf(entry)].map(([, bytes]) => new TextDecoder().decode(bytes))
    found[name] = JSON.parse(text)
  }
  return found
}

function* fieldsOf(bytes) {
  let at = 0
  const number = () => {
    let value = 0
    for (let shift = 1; ; shift *= 128) {
      const byte = bytes[at++]
      value += (byte % 128) * shift
      if (byte < 128) return value
    }
  }
  while (at < bytes.length) {
    const key = number()
    if (key % 8 === 2) {
      const end = number() + at
      yield [Math.floor(key / 8), bytes.subarray(at, end)]
      at = end
    } else number() // the file's others are whole numbers
  }
}

// (1, 3, S, S) numbers of an image, upright and on white, normalised.
async function viewOf(path, { size, mean, std, interpolation, resize_mode }) {
  const kernel = { bicubic: 'cubic', bilinear: 'linear', lanczos: 'lanczos3' }[interpolation]
  const fit = resize_mode === 'squash' ? 'fill' : 'cover'
  const { data } = await sharp(path)
    .rotate()
    .flatten({ background: 'white' })
    .toColourspace('srgb')
    .resize(size, size, { fit, kernel: kernel ?? interpolation })
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true })
  const view = new Float32Array(3 * size * size)
  for (let i = 0; i < view.length; i++) {
    const [pixel, colour] = [Math.floor(i / 3), i % 3]
    view[colour * size * size + pixel] = (data[i] / 255 - mean[colour]) / std[colour]
  }
  return new ort.Tensor('float32', view, [1, 3, size, size])
}

const [model, ...paths] = process.argv.slice(2)
const file = await readFile(model)
const { labels, preprocessing } = metadataOf(file)
const session = await ort.InferenceSession.create(file)
for (const path of paths) {
  const { probabilities } = await session.run({ images: await viewOf(path, preprocessing) })
  const best = probabilities.data.indexOf(Math.max(...probabilities.data))
  console.log(`${path}: ${labels[best]} ${(100 * probabilities.data[best]).toFixed(1)}%`)
}
