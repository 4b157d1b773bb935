"""The processes that render templates: when they start and end, what they may do, and what is believed of them."""

import gc
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest

from chat_templates import CONVERSATIONS, PARTS, SPECIAL, SYSTEM, template, user
from minivlm.errors import UserError
from minivlm.inputs import template_process, template_sandbox
from minivlm.inputs.template_process import TemplateProcess
from minivlm.inputs.templates import BUILT_IN
from paths import ROOT

WHY = [user("Why?")]
ANSWER = "USER: Why? ASSISTANT:"
LIBRARIES = str(Path(jinja2.__file__).parent.parent)
needs_proc = pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs Linux's /proc")


@pytest.fixture
def started(monkeypatch):
    """The processes that a test starts, as `subprocess.Popen`."""
    processes = []

    class Recorded(template_process._Worker):
        def __init__(self):
            super().__init__()
            processes.append(self._process)

    monkeypatch.setattr(template_process, "_Worker", Recorded)
    return processes


def kill(process):
    process.kill()
    process.wait(timeout=60)


@pytest.mark.parametrize("name", [*BUILT_IN, "demo"])
def test_known_templates_start_no_process(monkeypatch, name):
    monkeypatch.setattr(template_process, "_Worker", None)
    source = BUILT_IN[name] if name in BUILT_IN else (ROOT / "weights/demo/chat_template.jinja").read_text()
    assert "Why?" in template(source).render(WHY)


def test_a_template_changed_by_one_character_is_not_known(started):
    template(BUILT_IN["vicuna"] + " ")
    assert len(started) == 1


def test_one_process_serves_all_renderings_of_a_template(started):
    made = template(PARTS)
    for conversation in CONVERSATIONS:
        made.render(conversation)
    assert len(started) == 1 and started[0].poll() is None


def test_a_process_ends_with_its_template(started):
    made = template(PARTS)
    del made
    assert started[0].returncode is not None


def test_the_process_of_a_template_that_is_refused_ends_with_the_error(started):
    with pytest.raises(UserError) as excinfo:
        template("{% if %}")
    del excinfo
    gc.collect()
    assert started[0].returncode is not None


@pytest.mark.parametrize("source", [PARTS, *BUILT_IN.values(), "{{ strftime_now('%Z é') }}{{ 'é\U0001f600\0' }}"])
def test_the_text_is_that_of_this_process(source):
    for messages in CONVERSATIONS:
        flat = [{**m, "content": "".join(part.get("text", "<image>\n") for part in m["content"])} for m in messages]
        for content in messages, flat:
            variables = {"messages": content, "tools": None, "add_generation_prompt": True, **SPECIAL}
            outcomes = []
            for kind in TemplateProcess, template_sandbox.Template:
                try:
                    outcomes.append(kind(source).render(variables))
                except template_sandbox.TemplateFailure as failure:
                    outcomes.append(str(failure))
            assert outcomes[0] == outcomes[1]


def test_the_local_time_is_that_of_this_process(monkeypatch):
    days = []
    for zone in ("EAST-12", "WEST+12"):
        monkeypatch.setenv("TZ", zone)
        days.append(template("{{ strftime_now('%d ') }}" + PARTS).render(WHY).removesuffix(ANSWER))
    assert days[0] != days[1]


def test_a_failure_does_not_end_the_process(started):
    made = template(PARTS.replace("{% for message", "{{ 1 / (messages[0].role != 'zero') }}{% for message", 1))
    with pytest.raises(UserError, match="division by zero"):
        made.render([{"role": "zero", "content": "x"}])
    assert made.render(WHY) == "1.0" + ANSWER and len(started) == 1


def test_rendering_after_the_time_was_over(started):
    slow = "{% if messages[0].role == 'slow' %}{{ 10 ** (999999999 * messages | length) }}{% endif %}"
    made = template(slow + PARTS)
    with pytest.raises(UserError, match=r"fails: it takes longer than 1 second$"):
        made.render([{"role": "slow", "content": "x"}])
    assert made.render(WHY) == ANSWER and len(started) == 2 and started[0].returncode is not None


@pytest.mark.slow
def test_the_time_is_that_of_one_rendering():
    used = os.times().children_user
    made = template("{% for i in range(99999) %}{{ range(40) | sum * 0 if i == -1 }}{% endfor %}" + PARTS)
    for _ in range(80):
        assert made.render(WHY) == ANSWER
    del made
    assert os.times().children_user - used > 2 * template_sandbox.MAX_SECONDS


def test_rendering_after_the_process_was_killed(started):
    made = template(PARTS)
    kill(started[0])
    assert made.render(WHY) == ANSWER and len(started) == 2


def test_a_process_killed_while_it_renders(started):
    made = template(PARTS)
    started[0].send_signal(signal.SIGSTOP)  # it cannot answer before it is killed
    killer = threading.Timer(0.2, started[0].kill)
    killer.start()
    with pytest.raises(UserError, match="fails: the process that renders it was killed"):
        made.render(WHY)
    killer.join()
    assert made.render(WHY) == ANSWER


@pytest.mark.parametrize("text", ["short", "long" * 100_000])  # a long request does not fit into the pipe
def test_a_process_that_does_not_answer(started, monkeypatch, text):
    made = template(PARTS)
    started[0].send_signal(signal.SIGSTOP)
    monkeypatch.setattr(template_process, "_MAX_WAIT", 0.2)
    with pytest.raises(UserError, match="or did not answer"):
        made.render([user(text)])
    assert started[0].returncode is not None


def test_ctrl_c_while_a_process_renders(started):
    """The answer to the interrupted request must not be taken for the next one's."""
    made = template(PARTS)
    started[0].send_signal(signal.SIGSTOP)
    interrupt = threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            made.render([SYSTEM])
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode is not None and made.render(WHY) == ANSWER


@needs_proc
def test_ctrl_c_in_the_terminal_does_not_reach_the_process(started):
    made = template(PARTS)
    assert os.getsid(started[0].pid) != os.getsid(0)
    assert made.render(WHY) == ANSWER


def test_threads_do_not_get_each_other_s_text(started):
    made = template(PARTS)
    texts = [f"text {i}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        rendered = list(pool.map(made.render, [[user(text)] for text in texts]))
    assert rendered == [f"USER: {text} ASSISTANT:" for text in texts]
    del made
    assert all(process.returncode is not None for process in started)


FORK = """
import os, sys
from chat_templates import PARTS, template, user
made = template(PARTS)
[worker] = made._template._idle
child = os.fork()
for i in range(200):
    text = f"{child == 0} {i}"
    assert made.render([user(text)]) == f"USER: {text} ASSISTANT:"
if child == 0:
    sys.exit(7)
assert os.waitpid(child, 0)[1] == 7 << 8
assert made.render([user("x")]) == "USER: x ASSISTANT:" and made._template._idle == [worker]
"""
ENDS = """
import os, signal, sys
from chat_templates import PARTS, template
made = template(PARTS)
print(made._template._idle[0]._process.pid, flush=True)
"""


def run(code: str, **kwargs: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/helpers'}"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, **kwargs
    )


def test_a_fork_gets_a_process_of_its_own():
    done = run(FORK)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "how, status",
    [("", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9), ("os._exit(4)", 4)],
    ids=["end", "exit", "kill", "_exit"],
)
def test_no_process_outlives_the_interpreter(how, status):
    """`run` returns when nobody holds the pipe of stderr or stdout; the process itself must be gone soon after."""
    done = run(ENDS + how)
    assert (done.returncode, done.stderr) == (status, "")
    for _ in range(600):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.1)
    raise AssertionError("the process still runs")


@needs_proc
def test_what_the_process_has(started, monkeypatch):
    """No secrets in its environment, no files but its pipes, no files that it could write."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TZ", "UTC")
    made = template(PARTS)
    folder = Path(f"/proc/{started[0].pid}")
    names = {entry.partition(b"=")[0] for entry in (folder / "environ").read_bytes().split(b"\0")}
    assert names <= {b"", *map(str.encode, template_process._ENVIRONMENT)}
    assert sorted(each.name for each in (folder / "fd").iterdir()) == ["0", "1", "2"]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in (folder / "limits").read_text().splitlines()}
    assert limits["Max address space"] == [str(256 << 20)] * 2
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert made.render(WHY) == ANSWER


def test_a_system_with_lower_limits():
    """As in a container or under the fuzzer."""
    command = [sys.executable, "-I", "-S", "-B", template_sandbox.__file__, LIBRARIES]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 200000 && exec "$@"', "sh", *command],
        input=json.dumps(["{{ a }}", {"a": "x"}]) + "\n" + json.dumps(["{{ 'a' * 210000000 }}", {}]) + "\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ['[true, "x"]', '[false, "it takes too much memory"]'] and not done.stderr


@pytest.mark.parametrize(
    "executable, reason",
    [("/no/such/python", "cannot be started"), ("/", "cannot be started"), ("/bin/true", "ended with status 0")],
)
def test_a_process_that_does_not_start(monkeypatch, executable, reason):
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(UserError, match=f"test.jinja: the chat template fails: the process .*{reason}"):
        template(PARTS)


def test_no_thread_is_to_be_had(started, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", start)
    with pytest.raises(UserError, match="cannot be watched"):
        template(PARTS)
    assert started[0].returncode is not None


@pytest.mark.parametrize(
    "program",
    [
        "print('nonsense', flush=True); input()",
        "print('[true, 5]', flush=True); input()",
        "print('[true]', flush=True); input()",
        'print(\'[true, "a", "b"]\', flush=True); input()',
        'print(\'["true", "a"]\', flush=True); input()',
        "print('[true, \"\\\\ud800\"]', flush=True); input()",
        "print('[' * 100000, flush=True); input()",
        "import sys; sys.stdout.buffer.write(b'[true, \"\\xff\"]\\n'); sys.stdout.flush(); input()",
        "print('[true, \"x', end='', flush=True)",
        "import sys; sys.stdout.close(); input()",
        "import os; os.close(1); input(); input()",
        "while True: print('x' * 1000, end='')",
        "import os; os.kill(os.getpid(), 11)",
        "raise SystemExit(3)",
    ],
)
def test_a_process_is_not_believed(started, monkeypatch, tmp_path, program):
    """As if a template had broken out of the sandbox and spoke for its process."""
    path = tmp_path / "template_sandbox.py"
    path.write_text(f"input()\n{program}")
    monkeypatch.setattr(template_sandbox, "__file__", str(path))
    monkeypatch.setattr(template_process, "_MAX_LINE", 1 << 20)
    monkeypatch.setattr(template_process, "_MAX_WAIT", 1)
    with pytest.raises(UserError, match="the process that renders") as excinfo:
        template(PARTS)
    assert len(str(excinfo.value).splitlines()) == 1 and len(str(excinfo.value)) < 300
    assert all(process.returncode is not None for process in started)


def test_messages_that_are_too_long(started):
    made = template(PARTS)
    with pytest.raises(UserError, match="too long"):
        made.render([user("x" * (17 << 20))])
    assert made.render(WHY) == ANSWER and len(started) == 1
