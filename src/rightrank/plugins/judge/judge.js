"use strict";
const pairs = JSON.parse(document.getElementById("pairs").textContent);
const at = (name) => document.getElementById(name);
const choices = {};
let place = 0;

function show() {
  const done = Object.keys(choices).length;
  at("progress").textContent = `${done} of ${pairs.length} judged`;
  at("pair").hidden = place >= pairs.length;
  if (place >= pairs.length) return;
  for (const name of ["prompt", "a", "b"]) at(name).textContent = pairs[place][name];
}

function choose(outcome) {
  if (place >= pairs.length) return;
  choices[pairs[place].id] = outcome;
  place += 1;
  show();
}

function save() {
  const judge = at("judge").value.trim() || "judge";
  const blob = new Blob([JSON.stringify({ judge, choices }, null, 1)], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "choices.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

for (const outcome of ["a", "b", "tie"]) at(`choose-${outcome}`).addEventListener("click", () => choose(outcome));
at("back").addEventListener("click", () => { place = Math.max(0, place - 1); show(); });
at("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement) return;
  const outcome = { 1: "a", 2: "b", 3: "tie" }[event.key];
  if (outcome) choose(outcome);
});
show();
