"use strict";

const TOP = 5, NEAREST = 6, AT_ONCE = 3, TRIES = 5;
const $ = (id) => document.getElementById(id);
const readable = (name) => name.replaceAll("_", " ");  // a class's name as people read it
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const waiting = [];
let limits = null, names = null, busy = 0, locked = false;

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function request(path, options = {}) {
  const token = sessionStorage.getItem("token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  return fetch(path, { ...options, headers });
}

function problem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

// What the server says. Before the application has a word, as with too many clients or an error in
// it, that is no JSON.
async function content(response) {
  try {
    return await response.json();
  } catch {
    const why = [429, 503].includes(response.status) ? "is too busy" : "failed";
    return { detail: `The server ${why} (${response.status}). Try again later.` };
  }
}

async function describe() {
  let response;
  try {
    response = await request("./classes");
  } catch {
    return problem("The server does not answer. Reload the page once it is back.");
  }
  const found = await content(response);
  locked = response.status === 401;
  $("token-form").hidden = !locked;
  $("drop").hidden = locked;
  if (locked) {
    if (sessionStorage.getItem("token")) problem("That is not the token.");
    return;
  }
  if (!response.ok) return problem(found.detail);
  problem("");
  limits = found.limits;
  document.title = `${found.run} – dapt`;
  $("run").textContent = found.run;
  $("about").textContent =
    `${found.classes.length.toLocaleString()} classes · ${found.method} on ${found.backbone}`;
  $("warning").textContent = found.warning || "";
  $("warning").hidden = !found.warning;
  $("forecast").textContent = found.forecast ? expected(found.forecast) : "";
  $("forecast").hidden = !found.forecast;
  $("classes").replaceChildren(...found.classes.map((name) => element("li", readable(name))));
  names = found.feedback ? new Map(found.classes.map((name) => [readable(name), name])) : null;
  $("names").replaceChildren(...[...(names || new Map()).keys()].map((name) => {
    const option = element("option");
    option.value = name;
    return option;
  }));
}

function expected({ accuracy, low, high, images, confused, advice }) {
  const percent = (share) => (100 * share).toFixed(0);
  const pairs = confused.slice(0, 3).map(({ classes }) => classes.map(readable).join(" and "));
  return `Expected on new photos like those it was tuned on: ${percent(accuracy)} % right, most likely ` +
    `${percent(low)} to ${percent(high)} % (a forecast by ${images.toLocaleString()} held-out photos). ` +
    (pairs.length ? `Often confused: ${pairs.join("; ")}. ` : "") + advice;
}

function add(files) {
  if (locked) return;
  const cards = [];
  for (const file of files) {
    const card = element("article"), picture = element("img"), body = element("div");
    picture.src = URL.createObjectURL(file);
    picture.alt = "";
    picture.onload = () => URL.revokeObjectURL(picture.src);
    picture.onerror = () => { picture.hidden = true; };  // what browsers do not show
    body.append(element("h2", file.name || "pasted photo"), element("p", "waiting …"));
    card.append(picture, body);
    cards.push(card);
    waiting.push({ file, body });
  }
  $("results").prepend(...cards);
  while (busy < AT_ONCE && waiting.length) work();
}

async function work() {
  busy += 1;
  while (waiting.length) {
    const { file, body } = waiting.shift();
    let shown;
    try {
      shown = await classified(file);
    } catch (error) {
      shown = [element("p", error.message, "error")];
    }
    body.replaceChildren(body.firstChild, ...shown);
  }
  busy -= 1;
}

async function classified(file) {
  // The form's own lines need room beside the file.
  if (limits && file.size > limits.upload_bytes - 2048) {
    const room = (limits.upload_bytes / 1e6).toFixed(1);
    throw new Error(`The photo has ${(file.size / 1e6).toFixed(1)} MB, the server takes ${room} MB.`);
  }
  for (let tries = 1; ; tries += 1) {
    const form = new FormData();
    form.append("images", file, file.name || "photo");
    let response;
    try {
      response = await request(`./predict?top=${TOP}&nearest=${NEAREST}`, { method: "POST", body: form });
    } catch {
      throw new Error("The server does not answer.");
    }
    if ([429, 503].includes(response.status) && tries < TRIES) {
      await sleep(Number(response.headers.get("Retry-After") || 1) * tries);
      continue;
    }
    const found = await content(response);
    if (!response.ok) throw new Error(String(found.detail));
    return [...ranked(found.predictions[0]), ...(names ? [correction(file)] : [])];
  }
}

// A form by which a photo is kept for the next training, with the class that is right.
function correction(file) {
  const made = element("form", undefined, "row"), input = element("input");
  const button = element("button", "Keep it as this"), said = element("p", "", "kept");
  input.placeholder = "Wrong? What is it?";
  input.setAttribute("aria-label", "The class that is right");
  input.setAttribute("list", "names");
  input.required = true;
  made.append(input, button);
  made.addEventListener("submit", async (event) => {
    event.preventDefault();
    const right = names.get(input.value.trim());
    if (right === undefined) {
      said.textContent = "That is none of the classes.";
      return;
    }
    const form = new FormData();
    form.append("images", file, "photo");
    button.disabled = true;
    try {
      const path = `./feedback?class=${encodeURIComponent(right)}`;
      const response = await request(path, { method: "POST", body: form });
      const found = await content(response);
      said.textContent = response.ok ? `Kept as ${readable(right)} for the next training.` : String(found.detail);
    } catch {
      said.textContent = "The server does not answer.";
    }
    button.disabled = false;
  });
  const whole = element("div");
  whole.append(made, said);
  return whole;
}

function ranked(prediction) {
  const list = element("ol");
  for (const { class: name, probability } of prediction.classes) {
    const row = element("li"), bar = element("span", undefined, "bar");
    bar.style.width = `${100 * probability}%`;
    const percent = `${(100 * probability).toFixed(1)} %`;
    row.append(bar, element("span", readable(name)), element("span", percent, "number"));
    list.append(row);
  }
  if (!prediction.classes.length) list.append(element("li", "no label"));
  const nearest = prediction.nearest || [];
  if (!nearest.length) return [list];
  const strip = element("ul", undefined, "nearest");
  for (const { image, class: name, cosine } of nearest) {
    const entry = element("li"), picture = element("img");
    picture.alt = "";
    show(picture, image.replace(/^.*\/support\//, "./support/"));  // below wherever this page is
    entry.append(picture, element("span", readable(name)), element("span", cosine.toFixed(3), "number"));
    strip.append(entry);
  }
  return [list, element("h3", "Most similar of the images it was tuned on (cosine)"), strip];
}

const pictures = new Map();  // addresses by path, so that each is fetched once

async function show(picture, path) {
  if (!pictures.has(path)) pictures.set(path, fetched(path));
  const address = await pictures.get(path);
  if (address) picture.src = address;
  else pictures.delete(path);  // the next photo it is near to tries again
}

async function fetched(path) {
  try {
    const response = await request(path);
    return response.ok ? URL.createObjectURL(await response.blob()) : null;
  } catch {
    return null;
  }
}

$("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
document.addEventListener("paste", (event) => add(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
});
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  describe();
});
describe();
