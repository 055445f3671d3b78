from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from manyview.pipeline.errors import UserError, run
def main():
    {body}
run(main)
"""


def program(body: str, **kwargs) -> subprocess.Popen:
    words = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


ENDLESS = "while True: print('a line of output')"


@pytest.mark.parametrize("body", [ENDLESS, "print('x' * 100); input(); print('y'); sys.exit(0)", "input(); print('z')"])
def test_a_closed_pipe_ends_a_command_quietly(body):
    process = program(body, stdin=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)


def test_a_closed_pipe_of_its_own_is_no_reason_to_be_quiet():
    process = program("import os; reader, writer = os.pipe(); os.close(reader); os.write(writer, b'x')")
    assert "BrokenPipeError" in process.communicate()[1] and process.returncode == 1


REFUSED = {
    "a long name": ("open('/tmp/' + 'x' * 300)", f"error: /tmp/{'x' * 300}: File name too long\n"),
    "a file for a folder": ("open('/etc/passwd/x')", "error: /etc/passwd/x: Not a directory\n"),
    "no room": (
        f"raise OSError({errno.ENOSPC}, 'No space left on device', 'shard')",
        "error: shard: No space left on device\n",
    ),
    "a broken disk": (
        f"raise OSError({errno.EIO}, 'Input/output error', 'shard')",
        "error: shard: Input/output error\n",
    ),
    "two errors": ("raise UserError('one\\ntwo')", "error: one\nerror: two\n"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_system_or_the_user_is_at_fault_for_is_one_line(case):
    body, text = REFUSED[case]
    process = program(body)
    assert (process.communicate()[1], process.returncode) == (text, 2)


def test_what_is_a_fault_of_ours_keeps_its_traceback():
    process = program("open('/nowhere/at/all')")
    assert "Traceback" in process.communicate()[1] and process.returncode == 1


def test_help_into_a_closed_pipe_is_quiet():
    words = [sys.executable, os.path.join(os.path.dirname(__file__), "..", "tools", "shards.py"), "write", "--help"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == ("", 141)
