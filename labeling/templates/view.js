
"use strict";
// Everything that comes from trajectories goes into the page as text nodes and plain attributes,
// never as markup; the page's policy (trusted types) makes the browser refuse anything else.
(() => {
  const ROW = 76; // height of a list row in pixels, as in the style sheet
  const MARGIN = 8; // rows rendered above and below the visible ones
  const LONG = { lines: 12, characters: 1200 }; // longer texts are collapsed
  const OUTCOMES = { right: "✓ right", wrong: "✗ wrong", "cut off": "✂ cut off", broken: "⚠ broken" };
  const byId = (id) => document.getElementById(id);
  const parse = (id) => JSON.parse(byId(id).textContent);
  const summary = parse("data-summary");
  const rows = parse("data-index");
  const details = byId("data-details").textContent.trim().split("\n"); // parsed when selected
  const narrow = matchMedia("(max-width: 760px)");
  let view = []; // indices of the rows that match, in order
  let selected = -1; // index in rows
  let step = -1; // step the reader is at: 0 is the task

  // --- building blocks ---------------------------------------------------------------------

  function fill(node, children) {
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  }
  function el(tag, properties, ...children) {
    return fill(Object.assign(document.createElement(tag), properties), children);
  }
  function svg(tag, attributes, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return fill(node, children);
  }
  const known = (values) => values.filter((v) => v !== null);
  const number = (v) => v.toFixed(3);
  const signed = (v) => (v < 0 ? "−" : "+") + Math.abs(v).toFixed(3);
  const grouped = (n) => n.toLocaleString("en-US");
  const plural = (n, word) => `${grouped(n)} ${word}${n === 1 ? "" : "s"}`;
  const words = (name) => name.replaceAll("_", " ");
  const chip = (outcome) =>
    el("span", { className: `chip ${outcome === "right" || outcome === "wrong" ? outcome : "other"}` }, OUTCOMES[outcome]);

  function derive(row) {
    const values = known(row.v);
    row.low = values.length ? Math.min(...values) : null;
    row.width = null;
    row.drop = 0;
    row.dropStep = -1;
    row.v.forEach((value, t) => {
      if (value === null) return;
      row.width = Math.max(row.width ?? 0, row.h[t] - row.l[t]);
      const fall = t && row.v[t - 1] !== null ? row.v[t - 1] - value : 0;
      if (fall > row.drop) [row.drop, row.dropStep] = [fall, t];
    });
    // Where the intervals before and after overlap, the drop may be nothing but noise.
    row.clear = row.dropStep > 0 && row.h[row.dropStep] < row.l[row.dropStep - 1];
    row.text = `${row.k}\n${row.i}\n${row.q}`.toLowerCase();
  }

  // --- summary -----------------------------------------------------------------------------

  function histogram(title, counts, note) {
    const [width, height, base] = [190, 86, 72];
    const top = Math.max(1, ...counts.before.map((n, i) => n + counts.end[i]));
    const size = (width - 30) / counts.before.length;
    const graph = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", preserveAspectRatio: "xMinYMid" });
    const bins = counts.before.length;
    const busy = counts.before.map((n, i) => [n + counts.end[i], i]).filter(([n]) => n);
    graph.setAttribute("aria-label", `${title}: ` + busy
      .map(([n, i]) => `${(i / bins).toFixed(2)} to ${((i + 1) / bins).toFixed(2)}: ${n}`).join(", "));
    graph.append(svg("line", { x1: 28, x2: width, y1: base, y2: base, class: "c-axis" }));
    counts.before.forEach((before, i) => {
      const end = counts.end[i];
      const scale = (base - 8) / top;
      const bar = (y, n, name) =>
        svg("rect", { x: 29 + i * size, width: Math.max(1, size - 1.5), y: y - n * scale, height: n * scale, class: name });
      const range = `${(i / bins).toFixed(2)} to ${((i + 1) / bins).toFixed(2)}`;
      graph.append(svg("g", {}, svg("title", {}, `${range}: ${before} before the end, ${end} at the end`),
        bar(base, before, "c-before"), bar(base - before * scale, end, "c-end")));
    });
    for (const [x, label, anchor] of [[29, "0", "start"], [(width + 29) / 2, "0.5", "middle"], [width, "1", "end"]])
      graph.append(svg("text", { x, y: height - 3, "text-anchor": anchor }, label));
    graph.append(svg("text", { x: 25, y: 15, "text-anchor": "end" }, String(top)),
      svg("text", { x: 25, y: base, "text-anchor": "end" }, "0"));
    return el("section", { className: "chart" }, el("h2", {}, title), graph, el("p", { className: "muted" },
      el("span", { className: "key before" }, "before the end "),
      el("span", { className: "key end" }, "end"), note ? el("br", {}) : "", note ?? ""));
  }

  function facts(title, pairs) {
    const list = el("dl", {});
    for (const [name, value] of pairs) list.append(el("dt", {}, name), el("dd", {}, String(value)));
    return el("section", { className: "chart" }, el("h2", {}, title), list);
  }

  function showSummary() {
    const title = `Labelled trajectories: ${summary.folder}`;
    document.title = title;
    byId("title").textContent = title;
    byId("made").textContent = summary.made;
    byId("notes").textContent = summary.notes.join("\n");
    byId("notes").hidden = summary.notes.length === 0;
    const share = (n) => `${grouped(n)} (${((100 * n) / Math.max(1, summary.trajectories)).toFixed(1)} %)`;
    const charts = byId("charts");
    charts.append(
      histogram("Values", summary.values, `${grouped(summary.unknown)} unknown`),
      histogram("Interval widths", summary.widths, `mean ${summary.mean_width === null ? "unknown" : number(summary.mean_width)}`),
      facts("Cost", summary.cost),
      facts("Outcomes and stops", [
        ...Object.entries(summary.outcomes).map(([name, n]) => [OUTCOMES[name], share(n)]),
        ...Object.entries(summary.stops).map(([name, n]) => [words(name), share(n)]),
      ]));
    if (summary.scores) charts.append(facts("Scores", summary.scores));
    if (!summary.image) return;
    const image = el("img", { src: summary.image, alt: "Reliability diagram of the reward model" });
    const button = el("button", { type: "button", className: "quiet" }, "larger");
    button.onclick = () => { button.textContent = image.classList.toggle("large") ? "smaller" : "larger"; };
    charts.append(el("section", { className: "chart image" }, el("h2", {}, "Reliability ", button), image));
  }

  // --- the list ----------------------------------------------------------------------------

  function sparkline(row) {
    const graph = svg("svg", { viewBox: "0 0 72 46", "aria-hidden": "true" });
    const x = (t) => 4 + (64 * t) / Math.max(1, row.v.length - 1);
    const y = (v) => 42 - 38 * v;
    graph.append(svg("line", { x1: 0, x2: 72, y1: 42.5, y2: 42.5, class: "c-grid" }),
      svg("line", { x1: 0, x2: 72, y1: 3.5, y2: 3.5, class: "c-grid" }));
    row.v.forEach((value, t) => {
      if (value === null) return;
      if (t && row.v[t - 1] !== null)
        graph.append(svg("line", { x1: x(t - 1), y1: y(row.v[t - 1]), x2: x(t), y2: y(value), class: t === row.dropStep && row.clear ? "g-drop" : "g-value" }));
      graph.append(svg("circle", { cx: x(t), cy: y(value), r: 2, class: "g-dot" }));
    });
    return graph;
  }

  function listRow(place) {
    const row = rows[view[place]];
    const low = row.low === null ? "no value known" : `low ${row.low.toFixed(2)}`;
    const fall = row.dropStep < 0 ? "" : ` · drop −${row.drop.toFixed(2)}`;
    const node = el("div", { className: "row", id: `row-${view[place]}` },
      el("div", { className: "name mono" }, row.k),
      el("div", { className: "prompt" }, row.q),
      el("div", { className: "prompt" }, chip(row.o), `${row.e ? " · tool error" : ""} · ${plural(row.v.length - 1, "step")} · ${low}${fall}`),
      sparkline(row));
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", String(view[place] === selected));
    node.setAttribute("aria-setsize", String(view.length));
    node.setAttribute("aria-posinset", String(place + 1));
    node.style.top = `${place * ROW}px`;
    node.onclick = () => { select(place); read(); };
    return node;
  }

  function paintList() {
    const list = byId("list");
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - MARGIN);
    const last = Math.min(view.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + MARGIN);
    const nodes = [];
    for (let place = first; place < last; place += 1) nodes.push(listRow(place));
    byId("canvas").style.height = `${view.length * ROW}px`;
    byId("canvas").replaceChildren(...nodes);
    const shown = selected >= 0 && byId(`row-${selected}`);
    if (shown) list.setAttribute("aria-activedescendant", shown.id);
    else list.removeAttribute("aria-activedescendant");
  }

  function filterAndSort() {
    const text = byId("search").value.trim().toLowerCase();
    const [outcome, stop, order] = ["outcome", "stop", "order"].map((id) => byId(id).value);
    const bound = (id) => (byId(id).value === "" ? null : byId(id).valueAsNumber);
    const [from, to, errors] = [bound("from"), bound("to"), byId("errors").checked];
    const inside = (v) => v !== null && (from === null || v >= from) && (to === null || v <= to);
    view = [];
    rows.forEach((row, index) => {
      if ((text === "" || row.text.includes(text)) && (outcome === "" || row.o === outcome) &&
          (stop === "" || row.s === stop) && (!errors || row.e > 0) &&
          ((from === null && to === null) || row.v.some(inside))) view.push(index);
    });
    const names = new Intl.Collator("en", { numeric: true });
    const last = (value, unknown) => (value === null ? unknown : value);
    const orders = {
      id: (a, b) => names.compare(rows[a].k, rows[b].k) || names.compare(rows[a].i, rows[b].i),
      low: (a, b) => last(rows[a].low, 2) - last(rows[b].low, 2),
      width: (a, b) => last(rows[b].width, -1) - last(rows[a].width, -1),
      drop: (a, b) => rows[b].drop - rows[a].drop,
    };
    if (order in orders) view.sort((a, b) => orders[order](a, b) || a - b);
    byId("found").textContent = view.length === rows.length
      ? `${plural(rows.length, "trajectory").replace("trajectorys", "trajectories")}`
      : `${grouped(view.length)} of ${grouped(rows.length)} trajectories`;
    byId("clear").hidden = view.length === rows.length && order === "file" && text === "";
    select(Math.max(0, view.indexOf(selected)));
  }

  function select(place) {
    const list = byId("list");
    const index = view.length ? view[Math.min(Math.max(place, 0), view.length - 1)] : -1;
    const at = view.indexOf(index);
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
    if (index !== selected || index < 0) {
      selected = index;
      showTrajectory();
    }
    paintList();
  }
  const move = (by) => select(view.indexOf(selected) + by);

  // --- one trajectory ----------------------------------------------------------------------

  function longText(text, tag, className) {
    const node = el(tag, { className });
    const lines = text.split("\n", LONG.lines + 1);
    const short = lines.slice(0, LONG.lines).join("\n").slice(0, LONG.characters);
    node.textContent = short;
    if (short.length === text.length) return [node];
    node.textContent = `${short} …`;
    const all = `show all (${plural(text.split("\n").length, "line")}, ${plural(text.length, "character")})`;
    const button = el("button", { type: "button", className: "more-text quiet", textContent: all });
    button.setAttribute("aria-expanded", "false");
    button.onclick = () => {
      const open = button.getAttribute("aria-expanded") === "false";
      button.setAttribute("aria-expanded", String(open));
      node.textContent = open ? text : `${short} …`;
      button.textContent = open ? "show less" : all;
    };
    return [node, button];
  }

  function bar(row, t) {
    const [value, low, high, score] = [row.v[t], row.l[t], row.h[t], row.p ? row.p[t] : null];
    const node = el("div", { className: value === null ? "bar unknown" : "bar" });
    const place = (name, left, width) => {
      const part = el("span", { className: name });
      part.style.left = `${100 * left}%`;
      if (width !== undefined) part.style.width = `${100 * width}%`;
      node.append(part);
    };
    if (value !== null) {
      place("band", low, high - low);
      place("tick", value);
    }
    if (score !== null) place("mark", score);
    node.setAttribute("role", "img");
    const said = value === null ? "value unknown" : `value ${number(value)}, interval ${number(low)} to ${number(high)}`;
    node.setAttribute("aria-label", score === null ? said : `${said}, score ${number(score)}`);
    return node;
  }

  function numbers(row, t) {
    const node = el("div", { className: "numbers" });
    const add = (className, text) => node.append(el("span", { className }, text));
    if (row.v[t] === null) add("", "unknown");
    else node.append(el("span", {}, el("b", {}, number(row.v[t])), ` [${number(row.l[t])}, ${number(row.h[t])}]`));
    add("counts", row.n[t] ? `${row.c[t]}/${row.n[t]} right` : "no rollouts");
    if (row.u[t]) add("", `${row.u[t]} cut off`);
    if (row.f[t]) add("", `${row.f[t]} failed`);
    if (row.w && row.w[t]) add("muted", `${row.w[t]} came through it`);
    if (t && row.v[t] !== null && row.v[t - 1] !== null) {
      const by = row.v[t] - row.v[t - 1];
      add(by < 0 ? "delta-down" : by > 0 ? "delta-up" : "", `Δ ${by === 0 ? "0" : signed(by)}`);
    }
    if (row.p) add("score", `◆ ${row.p[t] === null ? "unknown" : number(row.p[t])}`);
    if (t === row.dropStep) add(row.clear ? "badge" : "badge muted", row.clear ? "▼ biggest drop" : "▼ biggest drop (intervals overlap)");
    return node;
  }

  function card(row, t, title, body) {
    const node = el("article", { className: t === row.dropStep && row.clear ? "step drop" : "step", id: `step-${t}`, tabIndex: -1 },
      el("header", {}, el("h3", { id: `head-${t}` }, title), bar(row, t), numbers(row, t)),
      el("div", { className: "body" }, body));
    node.setAttribute("aria-labelledby", `head-${t}`);
    return node;
  }

  function pretty(json) {
    try {
      const value = JSON.parse(json);
      const entries = value && typeof value === "object" ? Object.entries(value) : [];
      // One text argument (code, a query) reads best as it is, without JSON's escapes.
      if (entries.length === 1 && typeof entries[0][1] === "string") return [entries[0][0], entries[0][1]];
      return ["", JSON.stringify(value, null, 2)];
    } catch {
      return ["", json]; // what the model wrote need not be JSON
    }
  }

  function stepBody(made) {
    const start = made.c.length ? made.x.indexOf("<tool_call>") : -1;
    const thought = (start < 0 ? made.x : made.x.slice(0, start)).trim();
    const parts = [el("div", {}, longText(thought || "(no thought)", "p", thought ? "text" : "muted"))];
    if (made.m) parts.unshift(el("p", { className: "badge" }, `injected fault: ${made.m}`));
    made.c.forEach(([name, json], i) => {
      const [argument, text] = pretty(json);
      const [content, error, seconds] = made.o[i];
      parts.push(
        el("div", { className: "part call" },
          el("div", { className: "label" }, "call ", el("b", { className: "mono" }, name), argument ? ` · ${argument}` : ""),
          longText(text, "pre", "")),
        el("div", { className: error === null ? "part observation" : "part observation error" },
          el("div", { className: "label" }, "observation",
            error === null ? "" : el("span", { className: "kind" }, ` · error: ${error}`),
            seconds >= 0.0005 ? ` · ${seconds.toFixed(3)} s` : "",
            made.p ? el("span", { className: "score" }, ` · ◆ ${number(made.p[i])}`) : ""),
          longText(content === "" ? "(empty)" : content, "pre", "")));
    });
    if (start >= 0)
      parts.push(el("details", { className: "written" }, el("summary", {}, "turn as written"), longText(made.x, "pre", "")));
    return parts;
  }

  function overview(row) {
    const room = narrow.matches ? innerWidth - 80 : Math.min(920, byId("detail").clientWidth - 100);
    const gap = Math.max(18, Math.min(130, Math.floor(room / row.v.length)));
    const [left, top, height] = [34, 10, 110];
    const width = left + gap * row.v.length;
    const x = (t) => left + gap * (t + 0.5);
    const y = (v) => top + height * (1 - v);
    const graph = svg("svg", { width, height: height + 32, viewBox: `0 0 ${width} ${height + 32}`, role: "img" });
    graph.setAttribute("aria-label", "Values of the states: " + row.v.map((v) => (v === null ? "unknown" : v.toFixed(2))).join(", "));
    for (const v of [0, 0.5, 1])
      graph.append(svg("line", { x1: left, x2: width, y1: y(v), y2: y(v), class: "c-grid" }),
        svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, String(v)));
    const line = (values, t, name) => {
      if (t && values[t] !== null && values[t - 1] !== null)
        graph.append(svg("line", { x1: x(t - 1), y1: y(values[t - 1]), x2: x(t), y2: y(values[t]), class: name }));
    };
    row.v.forEach((v, t) => {
      if (v !== null) graph.append(svg("line", { x1: x(t), x2: x(t), y1: y(row.l[t]), y2: y(row.h[t]), class: "g-band" }));
    });
    row.v.forEach((v, t) => {
      line(row.v, t, t === row.dropStep && row.clear ? "g-drop" : "g-value");
      if (row.p) line(row.p, t, "g-score");
    });
    row.v.forEach((v, t) => {
      graph.append(v === null ? svg("text", { x: x(t), y: y(0.5) + 4, "text-anchor": "middle" }, "?")
        : svg("circle", { cx: x(t), cy: y(v), r: 4, class: "g-dot" }));
      if (row.p && row.p[t] !== null) {
        const [cx, cy] = [x(t), y(row.p[t])];
        graph.append(svg("path", { d: `M${cx} ${cy - 5}l5 5l-5 5l-5 -5z`, class: "g-mark" }));
      }
      if (gap >= 26 || t % 5 === 0) graph.append(svg("text", { x: x(t), y: top + height + 15, "text-anchor": "middle" }, String(t)));
      const hit = svg("rect", { x: left + gap * t, y: 0, width: gap, height: height + 32, class: "g-hit" }, svg("title", {}, `go to step ${t}`));
      hit.addEventListener("click", () => goTo(t));
      graph.append(hit);
    });
    return el("div", { className: "overview" }, el("p", { className: "muted" },
      `value after each step, with its interval${row.p ? "; ◆ score of the reward model" : ""}`), graph);
  }

  function showTrajectory() {
    const detail = byId("detail");
    step = -1;
    detail.scrollTop = 0;
    if (selected < 0) {
      const said = rows.length ? "No trajectory matches the filters." : "The folder holds no labelled trajectory.";
      detail.replaceChildren(el("p", { className: "empty" }, said));
      return;
    }
    const row = rows[selected];
    const made = JSON.parse(details[selected]);
    const back = el("button", { type: "button", className: "back" }, "← list");
    back.onclick = leave;
    const fact = (name, value) => el("span", {}, el("span", { className: "muted" }, `${name} `), el("b", {}, value));
    const last = row.v.length - 1;
    detail.replaceChildren(
      back,
      el("h2", { className: "mono" }, row.i),
      el("div", { className: "facts" }, chip(row.o),
        row.y === null ? null : fact("verdict", String(row.y)),
        fact("stop", words(row.s)), fact("answer", row.a === null ? "none" : row.a), fact("gold", row.g),
        fact("steps", String(last)), fact("tokens written", made.t ? grouped(made.t) : "unknown"),
        fact("tokens of its rollouts", grouped(made.r)), fact("policy", made.p || "unknown")),
      overview(row),
      card(row, 0, "Before step 1", [el("div", {}, longText(row.q, "p", "text"))]),
      ...made.s.map((one, i) => card(row, i + 1, `Step ${i + 1} of ${last}`, stepBody(one))));
    remember();
  }

  function goTo(t) {
    const node = byId(`step-${t}`);
    if (!node) return;
    step = t;
    read();
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "start" });
  }

  const read = () => { if (narrow.matches) document.body.classList.add("reading"); };
  function leave() {
    document.body.classList.remove("reading");
    paintList();
    byId("list").focus();
  }

  let waiting = 0;
  function remember() { // a link to this trajectory; delayed, as browsers limit how often
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      try { history.replaceState(null, "", `#${encodeURIComponent(rows[selected].i)}`); } catch { /* only a comfort */ }
    }, 300);
  }

  // --- keyboard and start ------------------------------------------------------------------

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
    const target = event.target;
    if (target.matches("input, select, textarea")) {
      if (event.key === "Escape" || (event.key === "Enter" && target.id === "search")) {
        event.preventDefault();
        byId("list").focus();
      }
      return;
    }
    const reading = byId("detail").contains(target);
    const inList = target === byId("list");
    const actions = {
      j: () => move(1), k: () => move(-1),
      ArrowDown: reading ? null : () => move(1), ArrowUp: reading ? null : () => move(-1),
      Home: inList ? () => select(0) : null, End: inList ? () => select(view.length - 1) : null,
      Enter: inList ? () => { read(); byId("detail").focus(); } : null,
      n: () => goTo(Math.min(step + 1, rows[selected]?.v.length - 1)), p: () => goTo(Math.max(step - 1, 0)),
      d: () => { if (rows[selected]?.dropStep >= 0) goTo(rows[selected].dropStep); },
      "/": () => { leave(); byId("search").focus(); }, "?": () => byId("help").showModal(), Escape: leave,
    };
    const action = Object.hasOwn(actions, event.key) ? actions[event.key] : null;
    if (!action) return;
    event.preventDefault();
    action();
    // The step that had the focus is gone with its trajectory: stay in the reading pane.
    if (reading && !document.body.contains(target) && document.activeElement === document.body) byId("detail").focus();
  }

  function choices(id, all, values, name) {
    byId(id).append(el("option", { value: "" }, all), ...values.map((v) => el("option", { value: v }, name(v))));
  }

  rows.forEach(derive);
  showSummary();
  choices("outcome", "any", Object.keys(summary.outcomes), (v) => OUTCOMES[v]);
  choices("stop", "any", Object.keys(summary.stops), words);
  byId("more").open = !narrow.matches;
  byId("summary").open = !narrow.matches;
  let wanted = "";
  try { wanted = decodeURIComponent(location.hash.slice(1)); } catch { /* not one of ours */ }
  selected = rows.findIndex((row) => row.i === wanted);
  const linked = selected;
  filterAndSort();
  if (linked >= 0) { showTrajectory(); read(); }
  performance.mark("list-shown");
  byId("filters").addEventListener("input", filterAndSort);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("clear").onclick = () => {
    byId("filters").reset();
    filterAndSort();
    byId("list").focus(); // the button goes away
  };
  byId("help-button").onclick = () => byId("help").showModal();
  document.addEventListener("keydown", onKey);
  new ResizeObserver(paintList).observe(byId("list"));
  let painted = false;
  byId("list").addEventListener("scroll", () => {
    if (painted) return;
    painted = true;
    requestAnimationFrame(() => { painted = false; paintList(); });
  });
})();
