"""The page's script in node, with the few elements that it touches."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from litgpt.serve.app import PAGE

SCRIPT = PAGE.read_text(encoding="utf-8").partition("<script>")[2].partition("</script>")[0]
STUBS = """
const elements = {}, bodies = [];
const made = () => ({ value: "", style: {}, classList: { remove() {}, toggle() {} }, parentElement: {}, handlers: {}, textContent: "",
  append() {}, replaceChildren() {}, focus() {}, addEventListener(name, act) { this.handlers[name] = act; } });
globalThis.document = { getElementById: (id) => (elements[id] ??= made()), createElement: made, querySelector: made,
  addEventListener() {} };
globalThis.Option = function () {};
globalThis.fetch = async (path, { body, signal }) => {
  if (path === "v1/models") return new Response(JSON.stringify({ data: [{ id: "tiny" }] }));
  bodies.push(JSON.parse(body).messages);
  const piece = `data: ${JSON.stringify({ choices: [{ delta: { content: "half" } }] })}\\n\\n`;
  return new Response(new ReadableStream({ start(stream) {
    stream.enqueue(new TextEncoder().encode(piece));
    signal.addEventListener("abort", () => stream.error(signal.reason));
  } }));
};
const pause = () => new Promise((done) => setTimeout(done, 50));
const send = async (text) => { elements.question.value = text; elements.form.handlers.submit({ preventDefault() {} }); await pause(); };
"""
STEPS = """
(async () => {
  await pause();
  await send("first");
  elements[FIRST].handlers.click();
  await pause();
  await send("second");
  console.log(JSON.stringify(bodies));
  process.exit();
})();
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
@pytest.mark.parametrize("button", ["new", "stop"])
def test_new_forgets_an_answer_that_runs(button: str) -> None:
    script = STUBS + SCRIPT + STEPS.replace("FIRST", json.dumps(button))
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    before = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "half"}] if button == "stop" else []
    assert json.loads(done.stdout) == [[{"role": "user", "content": "first"}], [*before, {"role": "user", "content": "second"}]]


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_tuned_model_is_chosen_and_compared_with_its_base() -> None:
    stubs = STUBS.replace('[{ id: "tiny" }]', '[{ id: "base" }, { id: "mine", parent: "base" }]')
    ends = '(async () => { await pause(); console.log(elements["model-a"].value, elements["model-b"].value); process.exit(); })();'
    done = subprocess.run(["node", "-e", stubs + SCRIPT + ends], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["mine", "base"], done.stderr
