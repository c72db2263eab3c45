(() => {
  // Titles of marks become a tip that appears at once. Without this the browser shows them after a while.
  const tip = document.body.appendChild(document.createElement("div"));
  tip.id = "tip";
  for (const title of document.querySelectorAll("main svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const mark = event.target instanceof Element && event.target.closest("[data-tip]");
    tip.style.display = mark ? "block" : "none";
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
    tip.style.top = (event.clientY + 18 + box.height < innerHeight ? event.clientY + 18 : event.clientY - box.height - 10) + "px";
  });
  // Headings of tables sort.
  for (const table of document.querySelectorAll("table.sorts")) {
    const body = table.tBodies[0];
    for (const th of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = th.textContent;
      th.replaceChildren(button);
      button.onclick = () => {
        const up = th.getAttribute("aria-sort") === "descending" ? "ascending" : "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        th.setAttribute("aria-sort", up);
        const of = (row) => row.cells[th.cellIndex].dataset.value ?? row.cells[th.cellIndex].textContent;
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [of(a), of(b)], numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
          if (x === "" || y === "") return (x === "") - (y === "");
          return (numbers ? x - y : x.localeCompare(y, undefined, { numeric: true })) * (up === "ascending" ? 1 : -1);
        });
        body.append(...rows);
      };
    }
  }
})();
