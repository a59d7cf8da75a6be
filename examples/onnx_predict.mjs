// Classify images with an ONNX file that 'dapt export' wrote, in JavaScript: here under Node, and
// with another way to read pixels, such as a canvas, in a browser too.
//
// npm install onnxruntime-web sharp
// node onnx_predict.mjs photos.onnx new/*.jpg
//
// Images are resized as 'dapt predict' does, so probabilities agree to about a percent.

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

const SINC = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x))
const KERNELS = {
  // name: [reach, weight at a distance]
  nearest: [0.5, () => 1],
  bilinear: [1, (x) => 1 - x],
  bicubic: [2, (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((2.5 - 0.5 * x) * x - 4) * x + 2)],
  lanczos: [3, (x) => SINC(x) * SINC(x / 3)],
}

// (count, length, step) bytes as (count, size, step), resized as Pillow does it: a pixel is the
// weighted mean of those below the kernel, which is as much wider as the image shrinks.
function resized(bytes, length, step, size, interpolation) {
  const [reach, weight] = KERNELS[interpolation]
  const scale = length / size
  const wide = interpolation === 'nearest' ? 1 : Math.max(scale, 1)
  const count = bytes.length / (length * step)
  const result = new Uint8ClampedArray(count * size * step) // it rounds
  for (let place = 0; place < size; place++) {
    const centre = (place + 0.5) * scale
    const first = Math.max(0, Math.floor(centre - reach * wide + 0.5))
    const last = Math.min(length, Math.floor(centre + reach * wide + 0.5))
    const weights = Array.from({ length: last - first }, (_, i) => {
      const distance = Math.abs(first + i + 0.5 - centre) / wide
      return distance <= reach ? weight(distance) : 0
    })
    const whole = weights.reduce((sum, one) => sum + one)
    for (let row = 0; row < count; row++) {
      for (let at = 0; at < step; at++) {
        let sum = 0
        for (let i = first; i < last; i++) {
          sum += weights[i - first] * bytes[(row * length + i) * step + at]
        }
        result[(row * size + place) * step + at] = sum / whole
      }
    }
  }
  return result
}

// (1, 3, S, S) numbers of an image, upright and on white, normalised.
async function viewOf(path, { size, mean, std, interpolation, resize_mode }) {
  const { data, info } = await sharp(path)
    .rotate()
    .flatten({ background: 'white' })
    .toColourspace('srgb')
    .removeAlpha()
    .raw()
    .toBuffer({ resolveWithObject: true })
  const sides = [info.width, info.height]
  const [width, height] = sides.map((side) =>
    resize_mode === 'squash' ? size : Math.floor((size * side) / Math.min(...sides)),
  )
  const rows = resized(data, info.width, 3, width, interpolation)
  const pixels = resized(rows, info.height, 3 * width, height, interpolation)
  // The centre; Python rounds halves to even.
  const [left, top] = [width - size, height - size].map((n) => Math.round(n / 2) - (n % 4 === 1))
  const view = new Float32Array(3 * size * size)
  for (let i = 0; i < view.length; i++) {
    const [colour, y, x] = [Math.floor(i / size ** 2), Math.floor(i / size) % size, i % size]
    const value = pixels[((top + y) * width + left + x) * 3 + colour]
    view[i] = (value / 255 - mean[colour]) / std[colour]
  }
  return new ort.Tensor('float32', view, [1, 3, size, size])
}

const [model, ...paths] = process.argv.slice(2)
if (!paths.length) {
  console.error('usage: node onnx_predict.mjs MODEL.onnx IMAGE ...')
  process.exit(1)
}
const file = await readFile(model)
const { labels, preprocessing } = metadataOf(file)
const session = await ort.InferenceSession.create(file)
for (const path of paths) {
  const { probabilities } = await session.run({ images: await viewOf(path, preprocessing) })
  const best = probabilities.data.indexOf(Math.max(...probabilities.data))
  console.log(`${path}: ${labels[best]} ${(100 * probabilities.data[best]).toFixed(1)}%`)
}
