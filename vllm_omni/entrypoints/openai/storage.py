"""What outlives the process: video jobs and stored results, in SQLite and a folder.

A file is written under another name and renamed, and a job is called completed only after its file is in place; so
whatever moment the process dies at, a job is found either done or as something that must run again.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_omni.errors import InvalidConfigError

JobState = Literal["queued", "in_progress", "completed", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, created INTEGER NOT NULL, state TEXT NOT NULL, content TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, created REAL NOT NULL, num_bytes INTEGER NOT NULL);
"""


@dataclass(kw_only=True)
class Job:
    """A video job. ``fields`` is the body as it was sent, so that it can run again; times are seconds since 1970."""

    id: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex[:24]}")
    created: int = field(default_factory=lambda: int(time.time()))
    state: JobState = "queued"
    fields: dict[str, Any]
    input_file: str | None = None  # the picture that it starts from
    num_starts: int = 0
    completed: int | None = None
    file: str | None = None
    result: dict[str, Any] = field(default_factory=dict)  # receipt and timings
    error: dict[str, Any] | None = None


class Storage:
    """One folder, used by one server at a time. Its methods may be called from any thread.

    ``folder`` None is a temporary one, which :meth:`close` removes.
    """

    def __init__(self, folder: Path | None, *, max_age_s: float, max_bytes: float) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="vllm-omni-") if folder is None else None
        self._folder = Path(self._temporary.name) if self._temporary is not None else Path(str(folder))
        self._files = self._folder / "files"
        self._max_age_s, self._max_bytes = max_age_s, max_bytes
        try:
            self._files.mkdir(parents=True, exist_ok=True)
            self._owner = (self._folder / "owner.lock").open("w")
            fcntl.flock(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._owner.close()
            raise InvalidConfigError(
                f"storage_dir={str(folder)!r} is used by another server; give each its own", option="storage_dir"
            ) from None
        except OSError as error:
            raise InvalidConfigError(
                f"storage_dir={str(folder)!r} cannot be used: {error.strerror}", option="storage_dir"
            ) from error
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(self._folder / "jobs.sqlite3", check_same_thread=False)
            with self._lock, self._database:
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._owner.close()
            raise InvalidConfigError(
                f"storage_dir={str(folder)!r} cannot be used: jobs.sqlite3 in it: {error}", option="storage_dir"
            ) from error

    def add_job(self, job: Job) -> None:
        """Write a new job. On return it is on the disk."""
        with self._lock, self._database:
            self._database.execute(
                "INSERT INTO jobs (state, content, id, created) VALUES (?, ?, ?, ?)", (*_row(job), job.created)
            )

    def put_job(self, job: Job) -> None:
        """Write what has changed of a job. One that was deleted in the meantime stays so."""
        with self._lock, self._database:
            self._database.execute("UPDATE jobs SET state = ?, content = ? WHERE id = ?", _row(job))

    def job(self, job_id: str) -> Job | None:
        found = self._jobs("WHERE id = ?", (job_id,))
        return found[0] if found else None

    def unfinished_jobs(self) -> list[Job]:
        """Those that a former process left, the oldest first."""
        return self._jobs("WHERE state IN ('queued', 'in_progress') ORDER BY rowid", ())

    def jobs(self, *, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """A page of jobs behind the job ``after``, and whether there are more."""
        # By rowid, which is the order in which they came: many have the same second.
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = "", []
        if after is not None:
            where = f"WHERE rowid {sign} (SELECT rowid FROM jobs WHERE id = ?)"
            values.append(after)
        found = self._jobs(f"{where} ORDER BY rowid {order} LIMIT ?", (*values, limit + 1))
        return found[:limit], len(found) > limit

    def delete_job(self, job: Job) -> None:
        with self._lock, self._database:
            self._database.execute("DELETE FROM jobs WHERE id = ?", (job.id,))
        for name in (job.file, job.input_file):
            if name is not None:
                self.delete_file(name)

    def put_file(self, content: bytes, suffix: str) -> str:
        """Store a file under a name that nobody can guess, and return the name."""
        name = f"{uuid.uuid4().hex}.{suffix}"
        path = self._files / name
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        with self._lock, self._database:
            self._database.execute("INSERT INTO files VALUES (?, ?, ?)", (name, time.time(), len(content)))
        return name

    def file(self, name: str) -> Path | None:
        """The path of a stored file; only names that :meth:`put_file` gave are looked up."""
        with self._lock:
            known = self._database.execute("SELECT 1 FROM files WHERE name = ?", (name,)).fetchone()
        path = self._files / name
        return path if known is not None and path.exists() else None

    def delete_file(self, name: str) -> None:
        with self._lock, self._database:
            self._database.execute("DELETE FROM files WHERE name = ?", (name,))
        (self._files / name).unlink(missing_ok=True)

    def expires(self, job: Job) -> int | None:
        return None if job.completed is None else int(job.completed + self._max_age_s)

    def sweep(self) -> None:
        """Drop what is too old, then the oldest of what is too much, and leftovers that no row names."""
        for job in self._jobs("WHERE state IN ('completed', 'failed')", ()):
            if time.time() > (self.expires(job) or 0):
                self.delete_job(job)
        waiting = {job.input_file for job in self.unfinished_jobs()}
        with self._lock:
            rows = self._database.execute("SELECT name, created, num_bytes FROM files ORDER BY created DESC").fetchall()
        total = 0
        for name, created, num_bytes in rows:
            total += num_bytes
            is_too_much = total > self._max_bytes or time.time() - created > self._max_age_s
            if is_too_much and name not in waiting:
                self.delete_file(name)
        known = {name for name, _, _ in rows}
        for path in self._files.iterdir():
            is_old = time.time() - path.stat().st_mtime > 60  # a younger one may be on its way into the table
            if path.name not in known and is_old:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._database.close()
        self._owner.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _jobs(self, condition: str, values: tuple[Any, ...]) -> list[Job]:
        query = f"SELECT id, created, state, content FROM jobs {condition}"
        with self._lock:
            rows = self._database.execute(query, values).fetchall()
        return [
            Job(id=key, created=created, state=state, **json.loads(content)) for key, created, state, content in rows
        ]


def _row(job: Job) -> tuple[str, str, str]:
    """State, content and id."""
    content = {name: value for name, value in vars(job).items() if name not in ("id", "created", "state")}
    return job.state, json.dumps(content), job.id
