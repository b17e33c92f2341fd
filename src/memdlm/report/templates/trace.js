const data = JSON.parse(document.getElementById("data").textContent), last = data.steps.length;
// Five stops of a scale whose lightness rises evenly, light enough for dark text.
const stops = [[129,140,222],[95,176,214],[110,206,160],[180,222,108],[253,231,76]];
const colour = share => {
  const place = share * (stops.length - 1), low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  const mix = [0,1,2].map(i => Math.round(stops[low][i] * (1 - part) + stops[low + 1][i] * part));
  return `rgb(${mix.join(",")})`;
};
const share = step => last > 1 ? (step - 1) / (last - 1) : 0;
const rows = document.getElementById("rows"), cells = data.rows.map(tokens => {
  const row = rows.appendChild(document.createElement("div"));
  row.className = "row";
  return tokens.map(text => {
    const cell = row.appendChild(document.createElement("span"));
    cell.dataset.given = text === null ? "" : "1";
    cell.dataset.text = text === null ? data.blank : text;
    row.appendChild(document.createElement("wbr"));
    return cell;
  });
});
const slider = document.getElementById("step"), label = document.getElementById("label");
const show = step => {
  slider.value = step;
  cells.forEach(row => row.forEach(cell => {
    cell.textContent = cell.dataset.text; cell.title = ""; cell.style.background = "";
    cell.className = cell.dataset.given ? "given" : "open";
  }));
  let settled = 0;
  data.steps.slice(0, step).forEach((changes, index) => changes.forEach(([row, column, text, sure, edited]) => {
    const cell = cells[row][column];
    if (!edited) settled += 1;
    cell.textContent = text;
    cell.className = "settled" + (edited ? " edited" : "") + (index + 1 === step ? " new" : "");
    cell.style.background = colour(share(index + 1));
    cell.title = `step ${index + 1}, confidence ${sure.toFixed(3)}${edited ? ", edited" : ""}`;
  }));
  label.textContent = `step ${step} of ${last}, ${settled} of ${data.total} tokens`;
};
let timer = null;
const play = document.getElementById("play");
const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
play.onclick = () => {
  if (timer) return stop();
  if (+slider.value >= last) show(0);
  play.textContent = "Pause";
  timer = setInterval(() => +slider.value >= last ? stop() : show(+slider.value + 1), Math.max(60, 6000 / last));
};
slider.max = last;
slider.oninput = () => { stop(); show(+slider.value); };
document.getElementById("legend").style.background =
  `linear-gradient(to right, ${[0, .25, .5, .75, 1].map(colour).join(",")})`;
// A step can be linked to: page.html#5.
show(location.hash ? Math.min(+location.hash.slice(1) || 0, last) : last);
