import ast
import gc
import os
import subprocess
import sys
import time

import pytest

from cabochon.core.errors import ConfigError, FolderError
from cabochon.data.corpus import module_of, standard_library, summaries


@pytest.fixture(scope="module")
def found():
    return summaries()


def test_the_corpus_is_source_of_many_modules_without_tests():
    corpus = standard_library()
    names = [each.source for each in (*corpus.train, *corpus.held_out)]
    assert len(names) == len(set(names)) > 300
    assert {"argparse.py", "json/decoder.py", "unittest/case.py"} <= set(names)
    left_out = {"test", "tests", "idle_test", "site-packages"}
    assert not any(left_out & set(name.split("/")) for name in names)
    assert not any("_sysconfigdata" in name or name.startswith("config-") for name in names)
    assert sum(len(each.text) for each in corpus.train) > 5_000_000
    assert corpus.skipped == ()


def test_modules_are_on_one_side_and_the_held_out_side_is_varied():
    corpus = standard_library()
    train = {module_of(each.source).lstrip("_") for each in corpus.train}
    held_out = {module_of(each.source).lstrip("_") for each in corpus.held_out}
    assert not train & held_out
    assert len(held_out) >= 10
    sizes = [len(each.text) for each in corpus.held_out]
    assert max(sizes) < sum(sizes) / 3


def test_the_same_corpus_comes_in_every_process():
    script = (
        "from cabochon.data.corpus import standard_library\n"
        "from cabochon.data.documents import content_hash\n"
        "corpus = standard_library()\n"
        "print(content_hash(corpus.train), content_hash(corpus.held_out))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "12"
    }
    assert len(outputs) == 1


def test_reading_is_fast():
    begin = time.process_time()
    standard_library()
    assert time.process_time() - begin < 1.5


def test_fractions_decide_how_much_is_held_out():
    assert standard_library(0.0).held_out == ()
    assert standard_library(1.0).train == ()
    with pytest.raises(ConfigError, match="must lie in"):
        standard_library(2.0)
    assert standard_library(salt="another").held_out != standard_library().held_out


def test_summaries_are_functions_without_their_docstrings(found):
    assert len(found.train) > 3000
    assert len(found.held_out) > 100
    assert found.skipped == ()
    for each in (*found.train[::20], *found.held_out):
        (function,) = ast.parse(each.function).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None or each.summary not in each.function
        assert "\n" not in each.summary
        assert len(each.summary.split()) >= 2


def test_summaries_are_on_the_side_of_their_module(found):
    corpus = standard_library()
    assert {module_of(each.source) for each in found.held_out} <= {
        module_of(each.source) for each in corpus.held_out
    }
    assert not {module_of(each.source) for each in found.train} & {
        module_of(each.source) for each in corpus.held_out
    }


def test_the_collector_runs_again_after_summaries(found):
    assert gc.isenabled()


SOURCE = '''\
class A:
    @property
    def first(self):
        """Return the first one, e.g. a leader.  And more.

        Details.
        """
        # a comment
        return self.all[0]

    def bare(self):
        """Nothing but a docstring here."""

    def inline(self): "Say it on one line."; return 1

    def shared(self):
        """Two statements on a line."""; return 1

    def silent(self):
        return 2

    def curt(self):
        """Curt."""
        return 3


def outer():
    """Make
    an inner one"""
    if True:
        async def inner(x):
            \'\'\'Wait for é!\'\'\'
            await x
    return inner
'''


def test_functions_are_taken_out_exactly(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE, "utf-8")
    found = summaries(0.0, folder=tmp_path)
    assert [(each.source, each.summary) for each in found.train] == [
        ("module.py:3", "Return the first one, e.g. a leader."),
        ("module.py:27", "Make an inner one"),
        ("module.py:31", "Wait for é!"),
    ]
    assert found.train[0].function == (
        "@property\ndef first(self):\n    # a comment\n    return self.all[0]\n"
    )
    assert found.train[2].function == "async def inner(x):\n    await x\n"


def test_files_that_cannot_be_used_are_reported(tmp_path):
    (tmp_path / "fine.py").write_bytes(b'def f():\r\n    """Say hello."""\r\n    return 1\r\n')
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "broken.py").write_text('"""x"""\ndef f(:\n')
    corpus = standard_library(0.0, folder=tmp_path)
    assert [each.source for each in corpus.train] == ["broken.py", "fine.py"]
    assert "\r" not in corpus.train[1].text
    assert corpus.skipped == ("latin.py: not UTF-8 at byte 5",)
    found = summaries(0.0, folder=tmp_path)
    assert [each.function for each in found.train] == ["def f():\n    return 1\n"]
    assert found.skipped == ("latin.py: not UTF-8 at byte 5", "broken.py: not Python at line 2")


def test_a_python_without_source_files_is_refused(tmp_path):
    with pytest.raises(FolderError, match="holds no Python source"):
        standard_library(folder=tmp_path)
