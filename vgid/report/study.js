// Runs in study.html once its pictures are drawn, with `payload` at hand.
const plot = document.getElementById("front");
const chosen = document.getElementById("chosen");
const { pages, server, near } = payload;
// Inside MLflow the page is a blob of the server's own address, shut off from everything else.
const framed = location.protocol === "blob:";
const address = (id) =>
  (framed ? new URL(location.href.slice(5)).origin + "/" : server) + pages[id];
const element = (kind, content, id) => {
  const made = document.createElement(kind);
  made.textContent = content;
  if (id) made.id = id;
  return made;
};
const link = (content, id) => {
  const made = element("a", content);
  made.setAttribute("href", address(id));
  made.setAttribute("target", "_blank");
  return made;
};
const copy = (content) => {
  const area = element("textarea", content);
  chosen.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
};

const table = document.querySelector("#candidates table");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const titles = heads.map((head) => head.textContent);
const rows = new Map([...body.rows].map((row) => [row.cells[0].textContent, row]));
for (const [id, row] of framed ? [] : rows)
  if (pages[id]) row.cells[0].replaceChildren(link(id, id));

const collator = new Intl.Collator("en", { numeric: true });
heads.forEach((head, column) => {
  const number = head.classList.contains("number");
  const button = element("button", titles[column].replace("-L", "\u2011L")); // no break there
  button.addEventListener("click", () => {
    // Numbers from the highest, at first.
    const sorted = head.getAttribute("aria-sort");
    const down = sorted ? sorted === "ascending" : number;
    const keyed = [...rows.values()].map((row) => [row.cells[column].textContent, row]);
    keyed.sort(([a], [b]) => {
      if (!a || !b) return !a - !b; // empty cells last
      const order = number ? parseFloat(a) - parseFloat(b) : collator.compare(a, b);
      return down ? -order : order;
    });
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.replaceChildren(...keyed.map(([, row]) => row));
  });
  head.replaceChildren(button);
});

const whole = { "xaxis.autorange": true, "yaxis.autorange": true };
const views = [["whole", whole], ["near", near]];
for (const [name, view] of views)
  document.getElementById(name)?.addEventListener("click", () => {
    for (const [each] of views)
      document.getElementById(each).setAttribute("aria-pressed", each === name);
    Plotly.relayout(plot, view);
  });

plot.on("plotly_click", ({ points: [point] }) => {
  const row = rows.get(point.customdata);
  if (row === undefined) return;
  Plotly.restyle(plot, { x: [[point.x]], y: [[point.y]] }, [plot.data.length - 1]);
  for (const each of body.querySelectorAll(".picked")) each.classList.remove("picked");
  row.classList.add("picked");
  const [id, state, setting, ...scores] = [...row.cells].map((cell) => cell.textContent);
  const told = scores.map((score, number) => score && `${titles[number + 3]} ${score}`);
  const line = element("div", [state, ...told].filter(Boolean).join(" · "));
  chosen.replaceChildren(element("b", `${id} · ${setting}`, "run"), line);
  if (!pages[id]) return;
  const where = element("div", "");
  if (framed) {
    const copied = copy(address(id));
    where.append(copied ? "Address of its run, copied: " : "Address of its run: ");
    where.append(element("span", address(id), "address"));
  } else {
    where.append(link("Open its run", id));
  }
  chosen.append(where);
});
