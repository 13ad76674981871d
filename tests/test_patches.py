"""The command that applies the diffs of patches/, and what these diffs do to the installed megatron-core."""

import json
import os
import shutil
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from flexolmo_megatron import patches
from flexolmo_megatron.errors import FlexOlmoError
from flexolmo_megatron.patches import PATCHES, change, core_version, main, patches_for, read_patch, rewrite

INSTALLED = Path(find_spec("megatron.core").origin).parent
ROOT = Path(__file__).parent.parent

DIFF = """\
diff --git a/megatron/core/one.py b/megatron/core/one.py
index 1..2 100644
--- a/megatron/core/one.py
+++ b/megatron/core/one.py
@@ -1,3 +1,4 @@ def context():
 a
-b
+B
+new
 c
@@ -6,2 +7,1 @@
-f
 g
diff --git a/megatron/core/two.py b/megatron/core/two.py
--- a/megatron/core/two.py
+++ b/megatron/core/two.py
@@ -2 +2 @@
-y
+Y
"""


@pytest.fixture
def tree(tmp_path):
    """A small tree of version 1.2.3 and a folder of patches with one for it."""
    core = tmp_path / "tree" / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "package_info.py").write_text("MAJOR = 1\nMINOR = 2\nPATCH = 3\nPRE_RELEASE = ''\n")
    (core / "one.py").write_text("a\nb\nc\nd\ne\nf\ng\n")
    (core / "two.py").write_text("x\ny\n")
    folder = tmp_path / "patches" / "core_v1.2.3"
    folder.mkdir(parents=True)
    (folder / "small.diff").write_text(DIFF)
    return tmp_path / "tree"


def test_a_diff_over_two_files_is_applied_and_reverted(tree):
    folder = tree.parent / "patches"
    core = tree / "megatron" / "core"
    before = {path: path.read_bytes() for path in core.iterdir()}
    (core / "one.py").chmod(0o640)
    os.link(core / "two.py", tree.parent / "cached_two.py")

    assert change(tree, apply=True, folder=folder) == ["small"]
    assert (core / "one.py").read_text() == "a\nB\nnew\nc\nd\ne\ng\n"
    assert (core / "two.py").read_text() == "x\nY\n"
    assert stat.S_IMODE((core / "one.py").stat().st_mode) == 0o640
    assert (tree.parent / "cached_two.py").read_text() == "x\ny\n", "a link into a package cache was written through"
    assert change(tree, apply=True, folder=folder) == []

    assert change(tree, apply=False, folder=folder) == ["small"]
    assert {path: path.read_bytes() for path in core.iterdir()} == before
    assert change(tree, apply=False, folder=folder) == []


def test_a_changed_file_is_refused_and_nothing_is_written(tree):
    core = tree / "megatron" / "core"
    (core / "two.py").write_text("x\nsomething else\n")
    with pytest.raises(FlexOlmoError, match=r"two\.py, line 2: the text is not upstream's, so the patch small neither"):
        change(tree, apply=True, folder=tree.parent / "patches")
    assert (core / "one.py").read_text() == "a\nb\nc\nd\ne\nf\ng\n"


def test_moved_lines_are_not_searched_for(tree):
    (tree / "megatron" / "core" / "one.py").write_text("inserted\na\nb\nc\nd\ne\nf\ng\n")
    with pytest.raises(FlexOlmoError, match=r"one\.py, line 1: the text is not upstream's"):
        change(tree, apply=True, folder=tree.parent / "patches")


def test_a_partly_applied_patch_is_refused(tree):
    (tree / "megatron" / "core" / "two.py").write_text("x\nY\n")
    with pytest.raises(FlexOlmoError, match="has a part of the patch small: restore megatron/core/one.py"):
        change(tree, apply=True, folder=tree.parent / "patches")


def test_a_failed_write_restores_the_files_before_it(tree, monkeypatch):
    core, write = tree / "megatron" / "core", patches._write

    def full_disk(path, text):
        if path.name == "two.py":
            raise FlexOlmoError(f"cannot write {path}: No space left on device")
        write(path, text)

    monkeypatch.setattr(patches, "_write", full_disk)
    with pytest.raises(FlexOlmoError, match="No space left"):
        change(tree, apply=True, folder=tree.parent / "patches")
    assert (core / "one.py").read_text() == "a\nb\nc\nd\ne\nf\ng\n"


def test_a_tree_of_another_version_is_refused(tree, capsys):
    assert main(["apply", str(tree)]) == 2
    assert "holds megatron-core 1.2.3: there are patches for 0.16.1 alone" in capsys.readouterr().err


def test_a_folder_that_holds_no_megatron_is_refused(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "says no version of megatron-core: expected a checkout of Megatron-LM or a site-packages folder" in error


def test_an_installation_without_patches_says_so(tree):
    with pytest.raises(FlexOlmoError, match="expected a checkout of flexolmo_megatron, which holds patches/"):
        patches_for(tree, tree / "nowhere")


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Two copies of the installed megatron-core; the second is patched."""
    if core_version(INSTALLED) != "0.16.1":
        pytest.skip(f"megatron-core {core_version(INSTALLED)} is installed, the patches are for 0.16.1")
    folders = [tmp_path_factory.mktemp(name) for name in ("upstream", "patched")]
    for folder in folders:
        shutil.copytree(INSTALLED, folder / "megatron" / "core", ignore=shutil.ignore_patterns("__pycache__"))
    assert main(["apply", str(folders[1])]) == 0
    return folders


def test_check_says_which_are_applied(trees, capsys):
    capsys.readouterr()
    assert [main(["check", str(folder)]) for folder in trees] == [1, 0]
    lines = capsys.readouterr().out.splitlines()
    names = [path.stem for path in sorted((PATCHES / "core_v0.16.1").glob("*.diff"))]
    assert lines == [f"{name}: not applied" for name in names] + [f"{name}: applied" for name in names]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_applies_the_same_diffs_with_the_same_result(trees, tmp_path):
    for path in (PATCHES / "core_v0.16.1").glob("*.diff"):
        for file, hunks in read_patch(path).items():
            upstream = trees[0] / file
            here = tmp_path / file
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(upstream, here)
            subprocess.run(["git", "apply", str(path)], cwd=tmp_path, check=True,
                           env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)})
            assert here.read_text() == rewrite(upstream.read_text(), hunks) == (trees[1] / file).read_text()


def test_every_patch_removes_a_fault_that_is_there_without_it(trees):
    """A patch whose fault is gone upstream fails here: then it can go."""
    found = []
    for folder in trees:
        result = subprocess.run([sys.executable, ROOT / "tests" / "core_faults.py"], capture_output=True, text=True,
                                env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}, timeout=300)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    names = {path.stem for path in (PATCHES / "core_v0.16.1").glob("*.diff")}
    assert set(found[0]) == set(found[1]) == names
    assert found[1] == dict.fromkeys(names)
    assert found[0]["router_without_transformer_engine"] == "NameError: name 'te_general_gemm' is not defined"
    assert found[0]["decoupled_lr_survives_loading"] == "AssertionError: resumed training differs"
    assert found[0]["torch_adamw_in_distributed_optimizer"].startswith("AssertionError")
