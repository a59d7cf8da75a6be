// The page reads well without this: it marks the part in view, and names a number's runs on hover.
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
})();
