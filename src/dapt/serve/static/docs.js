"use strict";

const $ = (id) => document.getElementById(id);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** A schema as an example of itself. */
function example(schema, schemas) {
  if (!schema) return null;
  if (schema.$ref) return example(schemas[schema.$ref.split("/").pop()], schemas);
  if (schema.anyOf) return example(schema.anyOf[0], schemas);
  if (schema.type === "array") return [example(schema.items, schemas)];
  if (schema.type === "object" || schema.properties) {
    const entries = Object.entries(schema.properties || {});
    return Object.fromEntries(entries.map(([name, value]) => [name, example(value, schemas)]));
  }
  return schema.format || schema.type || "any";
}

function table(title, rows) {
  const made = element("table");
  for (const [name, ...lines] of rows) {
    const row = element("tr"), first = element("td"), second = element("td");
    first.append(element("code", name));
    second.append(...lines.filter(Boolean).map((line) => element("p", line)));
    row.append(first, second);
    made.append(row);
  }
  return [element("h3", title), made];
}

function shown(path, method, operation, schemas) {
  const card = element("article", undefined, "operation"), heading = element("h2");
  heading.append(element("code", method.toUpperCase()), " ", element("code", path));
  card.append(heading, element("p", operation.description || operation.summary));
  const parameters = (operation.parameters || []).map(({ name, in: place, required, schema, description }) => {
    const bounds = [["minimum", "at least"], ["maximum", "at most"], ["default", "default"]]
      .filter(([key]) => key in schema).map(([key, word]) => `${word} ${schema[key]}`);
    const kind = [schema.type, place, required ? "required" : "", ...bounds].filter(Boolean);
    return [name, description, kind.join(", ")];
  });
  for (const [kind, { schema }] of Object.entries(operation.requestBody?.content || {})) {
    if (!schema.properties) parameters.push(["body", schema.description, kind]);
    for (const [name, value] of Object.entries(schema.properties || {})) {
      const files = kind.startsWith("multipart") ? "files" : "list";
      parameters.push([name, value.description, `${files}, in a body of ${kind}`]);
    }
  }
  if (parameters.length) card.append(...table("Parameters", parameters));
  const responses = Object.entries(operation.responses);
  card.append(...table("Answers", responses.map(([status, { description, content }]) =>
    [status, description, Object.keys(content || {}).join(", ")])));
  const schema = operation.responses["200"]?.content?.["application/json"]?.schema;
  if (schema) card.append(element("pre", JSON.stringify(example(schema, schemas), null, 2)));
  return card;
}

async function describe() {
  try {
    const found = await (await fetch("./openapi.json")).json();
    $("title").textContent = `${found.info.title} ${found.info.version}`;
    $("description").textContent = found.info.description;
    const place = new URL("./predict?top=3", document.baseURI);
    $("example").textContent = `curl -F images=@photo.jpg '${place}'`;
    for (const [path, methods] of Object.entries(found.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        $("operations").append(shown(path, method, operation, found.components?.schemas || {}));
      }
    }
  } catch {
    $("description").textContent = "The server does not answer. Reload the page once it is back.";
  }
}

describe();
