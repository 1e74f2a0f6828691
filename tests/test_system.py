"""Files on Windows, as far as it can be tried elsewhere: without what POSIX alone has, and with
locks of bytes in place of it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

# Byte locks of POSIX stand for those of Windows: one process each, in another they are refused.
WINDOWS = """
import fcntl, os, secrets, sys, types  # secrets: what it needs looks for forks by itself
at_fork = os.register_at_fork
def locking(descriptor, mode, count):
    flags = {0: fcntl.LOCK_UN, 2: fcntl.LOCK_EX | fcntl.LOCK_NB}[mode]
    try:
        fcntl.lockf(descriptor, flags, count, 0, os.SEEK_CUR)
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0)
sys.modules["fcntl"] = None
for name in ("setxattr", "getxattr", "pwrite", "register_at_fork", "O_DIRECTORY", "O_NOFOLLOW",
             "O_NONBLOCK"):
    delattr(os, name)
from pathlib import Path
from evenlight.cache import files, system
from evenlight.cache.errors import StoreError
del sys.modules["msvcrt"]  # by which the standard library knows Windows
os.register_at_fork = at_fork  # without which torch is not to be had
assert not system.POSIX
folder = Path(sys.argv[1])
"""


def begin(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WINDOWS + textwrap.dedent(code), folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )


def result(code: str, folder: Path) -> str:
    process = begin(code, folder)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return said.strip()


def test_files_are_written_whole_and_leave_no_temporary(tmp_path):
    said = result(
        """
        files.make_folder(folder / "a/b")
        files.atomic_write(folder / "a/b/x.json", b"1\\r\\n2\\n")
        files.write_json(folder / "a/b/x.json", {"one": 1})
        print(files.read_json(folder / "a/b/x.json"))
        """,
        tmp_path,
    )
    assert said == "{'one': 1}"
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["x.json"]


def test_of_two_runs_one_is_refused_by_name_and_a_killed_one_is_taken_over(tmp_path):
    holding = """
        with files.Lock(folder / "lock", "store x"):
            print("held", flush=True)
            input()
    """
    asking = """
        try:
            with files.Lock(folder / "lock", "store x") as held:
                held.confirm()
                print("ours")
        except StoreError as error:
            print(error)
    """
    holder = begin(holding, tmp_path)
    assert holder.stdout.readline() == "held\n"
    said = result(asking, tmp_path)
    assert said.startswith(f"store x is in use by process {holder.pid} on host")
    holder.kill()
    holder.communicate()
    assert result(asking, tmp_path) == result(asking, tmp_path) == "ours"


def test_private_folders_go_with_their_process_and_those_of_killed_ones_with_the_next(tmp_path):
    making = """
        made = files.private_folder("evenlight-test-")
        (made / "file").touch()
        print(made.name, flush=True)
        input()
    """
    living, killed = begin(making, tmp_path), begin(making, tmp_path)
    names = [process.stdout.readline().strip() for process in (living, killed)]
    killed.kill()
    killed.communicate()
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    result("files.private_folder('evenlight-test-')", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [names[0]]
    living.communicate("\n")
    assert living.returncode == 0 and list(tmp_path.iterdir()) == []


def test_a_folder_of_photos_is_corrected_and_the_same_command_does_nothing(tmp_path):
    """Attributes are named streams there; here, files whose name holds the colon."""
    code = f"""
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from toy_corrector import save_toy_corrector, toy_models
        from toys import write_photos
        from evenlight.pipeline import load
        from evenlight.pipeline.correct import correct_files
        load.load_models = toy_models
        model = save_toy_corrector(folder / "model")
        write_photos(folder / "photos", 2)
        for _ in range(2):
            report = correct_files(folder / "photos", folder / "out", model=model)
            print(len(report.corrected), len(report.skipped), report.failed)
    """
    assert result(code, tmp_path) == "2 0 []\n0 2 []"
    assert (tmp_path / "out/photo_000.png:user.evenlight").is_file()
