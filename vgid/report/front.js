// Runs in page.html once the picture is drawn, with `plot` and `payload` at hand.
const { data, trials, server } = payload;
const chosen = document.getElementById("chosen");
// Inside MLflow the page is a blob of the server's own address, shut off from everything else.
const framed = location.protocol === "blob:";
const address = (page) => (framed ? new URL(location.href.slice(5)).origin + "/" : server) + page;
const element = (kind, content, id) => {
  const made = document.createElement(kind);
  made.textContent = content;
  if (id) made.id = id;
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
const choose = (point) => {
  const trial = trials[point.customdata];
  if (trial === undefined) return;
  Plotly.restyle(plot, { x: [[point.x]], y: [[point.y]] }, [data.length - 1]);
  chosen.replaceChildren(element("b", trial.name, "run"), element("div", trial.scores));
  if (!trial.page) return;
  const line = element("div", "");
  if (framed) {
    const copied = copy(address(trial.page));
    line.append(copied ? "Address of its run, copied: " : "Address of its run: ");
    line.append(element("span", address(trial.page), "address"));
  } else {
    const link = element("a", "Open its run", "address");
    link.setAttribute("href", address(trial.page));
    link.setAttribute("target", "_blank");
    line.append(link);
  }
  chosen.append(line);
};
plot.on("plotly_click", (event) => choose(event.points[0]));
