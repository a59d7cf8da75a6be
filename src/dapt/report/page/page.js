// The page reads well without this: it marks the part in view, names a number's runs on hover, and
// lets methods be chosen, of which nothing is kept.
(() => {
  const nav = document.querySelector("nav");
  const links = new Map([...nav.querySelectorAll("li a")].map((a) => [a.hash.slice(1), a]));
  const parts = [...links.keys()].map((id) => document.getElementById(id));
  let here = null;
  const mark = () => {
    const last = parts.filter((part) => part.getBoundingClientRect().top < 140).pop();
    const atEnd = innerHeight + scrollY >= document.documentElement.scrollHeight - 4;
    const now = links.get((atEnd && scrollY > 0 ? parts[parts.length - 1] : last || parts[0]).id);
    if (now === here) return;
    if (here) here.classList.remove("here");
    here = now;
    here.classList.add("here");
    if (nav.scrollWidth > nav.clientWidth) nav.scrollLeft = here.offsetLeft - nav.clientWidth / 2;
  };
  addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });
  addEventListener("resize", mark);
  mark();
  document.addEventListener("mouseover", (event) => {
    const link = event.target.closest && event.target.closest('td a[href^="#run"], .quiet');
    if (!link || link.title) return;
    const one = link.hash.match(/^#run-(\d+)$/);
    const set = document.getElementById(link.hash.slice(1));
    if (one) link.title = `run ${one[1]}: ${set.querySelector(".path").textContent}`;
    else link.title = set.textContent.trim().replace(/\s+/g, " ");
  });
  const choice = document.getElementById("choice");
  if (!choice) return;
  choice.hidden = false;
  const rows = [...document.querySelectorAll("main [data-row]")];
  const marks = rows.filter((row) => row.closest("svg"));
  const boxes = [...choice.querySelectorAll("label[data-row] input")];
  const show = () => {
    const off = new Set(boxes.filter((b) => !b.checked).map((b) => b.parentNode.dataset.row));
    for (const row of rows) {
      if (row.closest("svg")) row.classList.toggle("off", off.has(row.dataset.row));
      else if (!choice.contains(row)) row.hidden = off.has(row.dataset.row);
    }
    for (const head of document.querySelectorAll("tr.group")) {
      let next = head.nextElementSibling;
      while (next && next.hidden) next = next.nextElementSibling;
      head.hidden = !next || next.classList.contains("group");
    }
    for (const group of choice.querySelectorAll("[data-group]")) {
      const own = boxes.filter((box) => group.closest("fieldset").contains(box));
      group.checked = own.some((box) => box.checked);
      group.indeterminate = group.checked && !own.every((box) => box.checked);
    }
  };
  choice.addEventListener("change", (event) => {
    if ("group" in event.target.dataset) {
      const own = event.target.closest("fieldset").querySelectorAll("label[data-row] input");
      for (const box of own) box.checked = event.target.checked;
    }
    show();
  });
  const light = (event) => {
    const at = event.target.closest && event.target.closest("[data-row]");
    for (const mark of marks) {
      mark.classList.toggle("dim", Boolean(at) && mark.dataset.row !== at.dataset.row);
    }
  };
  for (const what of ["mouseover", "focusin"]) document.addEventListener(what, light);
  choice.reset();
  show();
})();
