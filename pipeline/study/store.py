"""Store: the studies of a root folder. A database holds ended trials, `mlruns/studies/<study>/` holds files."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from pipeline.errors import InvalidInput, Problem, StorageError, StudyBusy, counted, did_you_mean
from pipeline.files.atomic import sweep, write_atomic
from pipeline.files.locks import LOCK, is_study_name, lock, refuse_links, study_folder
from pipeline.files.postgres import STORAGE
from pipeline.space.load import space_from_document
from pipeline.space.placement import PlacementRules
from pipeline.space.search_space import SearchSpace
from pipeline.study.database import Database, garbage_kept, storage_errors
from pipeline.study.sqlite import SqliteDatabase
from pipeline.study.study import HEADER, Study, group_size

FORMAT = 3
"""Version of the format in which a study stores its header and its trials."""
RECORD = "record"
"""File in the folder of a study in a PostgreSQL database, with the URL of the database."""
HEADER_TYPES = {
    "space": str,
    "document": Mapping,
    "trials": int,
    "group_size": int,
    "placement": Mapping,
    "created": float,
    "fingerprint": Mapping | None,
    "confirmed": int | None,
    "finished": int | None,
    "warm_start": Mapping | None,
}
"""Stored field of a `StudyHeader` to its types."""


@dataclass(frozen=True, kw_only=True)
class StudyHeader:
    """A study without its trials."""

    name: str
    space: str
    """Name of the space."""
    document: Mapping[str, Any]
    """Document of the space."""
    trials: int
    """Total number of trials that was last asked for."""
    group_size: int
    """Number of trials that are proposed at a time."""
    placement: Mapping[str, Any]
    """`PlacementRules` as plain values."""
    fingerprint: Mapping[str, str] | None
    """Part of the workload, such as its code, to a text that changes with it; None in studies of earlier versions."""
    confirmed: int | None
    """Number of trials after which the confirmation was complete; None in studies of earlier versions."""
    finished: int | None
    """Number of trials after which nothing was left to do; None in studies of earlier versions."""
    warm_start: Mapping[str, Any] | None
    """`WarmStart` as plain values, by which the same search finds the study again; the document has the configs."""
    ended: int
    """Number of stored trials."""
    created: float
    """Seconds since 1970."""

    @property
    def identity(self) -> str:
        """Identity of the study; a study of the same name in a new database has another identity."""
        return f"{self.created:.6f}"

    def lacks(self, trials: int, *, confirm: bool) -> bool:
        """Return whether the study lacks trials of a total, or its end, or the confirmation if that is wanted."""
        unconfirmed = confirm and self.confirmed not in (None, self.ended)
        return self.ended < trials or self.finished not in (None, self.ended) or unconfirmed


class Store:
    """The studies below a root folder.

    Args:
        root: Folder that holds `mlruns/`; creating the first study makes it.
        url: URL of a PostgreSQL database that holds the ended trials, as `pipeline.files.postgres.read_url` returns it;
            None: `mlruns/optuna.db` does.
        warn: Takes one sentence for people, such as that the database is locked by another program.
    """

    def __init__(self, root: Path, url: str | None = None, *, warn: Callable[[str], None] = lambda _: None) -> None:
        self.root = root
        self.url = url
        self.database = root / "mlruns" / "optuna.db"
        """Path of the database, unless there is a URL."""
        self._database = _database(root, url, warn)
        self._warn = warn

    @property
    def place(self) -> str:
        """Where studies are looked for, in messages: the URL, or else the root."""
        return self.url or str(self.root)

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def stop_waiting_when(self, interrupted: Callable[[], bool]) -> None:
        """Have no wait for the database outlast an interruption."""
        self._database.interrupted = interrupted

    def headers(self) -> list[StudyHeader]:
        """Return the header of every study, oldest first; write nothing.

        Raises:
            InvalidInput: The database cannot be read, or holds a study of another format.
        """
        headers = []
        studies = self._studies()
        ended = self._database.count_trials() if studies else {}
        for name, attrs in studies.items():
            header = attrs.get(HEADER)
            if not isinstance(header, Mapping) or not is_study_name(name):
                continue  # another program's study
            if header.get("format") != FORMAT:
                message = f"is of format {header.get('format')}, and this version reads format {FORMAT}"
                remedy = f"use another {self._database.option}"
                raise InvalidInput(self._database.name, [Problem(name, f"{message}; {remedy}")])
            values: dict[str, Any] = {key: header.get(key) for key in HEADER_TYPES}
            if wrong := [key for key, types in HEADER_TYPES.items() if not isinstance(values[key], types)]:
                remedy = "restore it, or remove the study with Optuna's command line: optuna delete-study"
                message = f"another program changed its {wrong[0]}, got {values[wrong[0]]!r}; {remedy}"
                raise InvalidInput(self._database.name, [Problem(name, message)])
            headers.append(StudyHeader(name=name, ended=ended.get(name, 0), **values))
        return sorted(headers, key=lambda header: header.created)

    def choose(
        self,
        space: SearchSpace,
        *,
        trials: int,
        name: str | None,
        rows: int | None = None,
        fingerprint: Mapping[str, str] | None = None,
        confirm: bool = True,
    ) -> tuple[str, bool]:
        """Choose the study that a search resumes or begins; write nothing.

        Without a name, choose the newest unfinished study of the same space, seed, number of trials and, if given,
        rows and fingerprint; else a new `<space>-N`. A warm start is the same if it names the same study and number of
        configs, whatever has become of that study since.

        Returns:
            The study's name, and whether the study exists.

        Raises:
            InvalidInput: The named study has another space, fingerprint or other rows; the message shows the
                differences.
        """
        known = {header.name: header for header in self.headers()}
        if name is None:
            for header in reversed(known.values()):
                same_rows = rows in (None, header.placement["rows"])
                if (
                    header.trials == trials
                    and header.lacks(trials, confirm=confirm)
                    and same_rows
                    and not list(fingerprint_changes(header.fingerprint, fingerprint))
                    and _compared(header, space) == searched_part(_as_given(space))
                ):
                    return header.name, True
            taken = set(self._studies())
            taken |= {name for name in self._folders() if self._is_of_another_record(name)}
            return next(n for i in itertools.count(1) if (n := f"{space.name}-{i}") not in taken), False
        self.refuse_another_record(name, "--study")
        if name not in known:
            if name in self._studies():
                message = "was made by another program in the same database"
                message += "; choose another name, or remove it with `optuna delete-study`"
                raise InvalidInput("--study", [Problem(name, message)])
            return name, False
        if differences := list(_differences(_compared(known[name], space), searched_part(_as_given(space)))):
            remedy = "a study keeps its space; choose another --study, or the space that it was made with"
            if [problem.place for problem in differences] == ["seed"]:
                remedy = f"a study keeps its seed; choose another --study, or --seed {known[name].document['seed']}"
            raise InvalidInput(f"--study {name}", differences, remedy=remedy, show=8)
        if changed := [Problem(part, how) for part, how in fingerprint_changes(known[name].fingerprint, fingerprint)]:
            remedy = (
                "its trials would be ranked with others; change it back, seed data that is drawn at random, choose "
            )
            remedy += "another --study, or, if what changed does not matter, add --changed-code"
            raise InvalidInput(f"--study {name}", changed, remedy=remedy)
        if rows not in (None, stored := known[name].placement["rows"]):
            kept = f"the study trains with {'auto' if stored is None else stored}, on which its numbers depend"
            raise InvalidInput("--rows", [Problem(str(rows), f"{kept}; leave --rows away, or choose another --study")])
        return name, True

    def create(
        self,
        space: SearchSpace,
        *,
        name: str,
        trials: int,
        rules: PlacementRules,
        fingerprint: Mapping[str, str] | None = None,
    ) -> Study:
        """Begin a study. Its space must have the configs of a warm start.

        Raises:
            InvalidInput: The database cannot be written.
        """
        assert isinstance(space.document["enqueue"], list)
        header = {
            "format": FORMAT,
            "space": space.name,
            "document": space.document,
            "trials": trials,
            "group_size": group_size(space, rules),
            "placement": rules.to_dict(),
            "fingerprint": fingerprint,
            "confirmed": 0,
            "finished": 0,
            "warm_start": None if space.warm_start is None else dataclasses.asdict(space.warm_start),
            "created": time.time(),
        }
        self._database.storage(create=True)
        self._database.write(
            f"creating study {name}",
            lambda: self._database.create_study(name, space.objective, {HEADER: header}),
            arrived=lambda: name in self._studies(),
        )
        return self.open(name)

    def open(
        self,
        name: str | None,
        *,
        trials: int | None = None,
        fingerprint: Mapping[str, str] | None = None,
    ) -> Study:
        """Open a study, by default the newest, with its stored space.

        A total of trials, or a fingerprint, replaces what is stored.

        Raises:
            InvalidInput: There is no such study.
        """
        header = self.header(name)
        stored = {"trials": header.trials, "fingerprint": header.fingerprint}
        wanted = {"trials": trials or header.trials, "fingerprint": fingerprint or header.fingerprint}

        def update() -> None:
            optuna_study = optuna.load_study(study_name=header.name, storage=self._database.storage())
            optuna_study.set_user_attr(HEADER, optuna_study.user_attrs[HEADER] | wanted)

        def load() -> Study:
            return Study(
                space_from_document(header.document, name=header.space),
                name=header.name,
                identity=header.identity,
                planned=trials or header.trials,
                group_size=header.group_size,
                database=self._database,
            )

        if wanted != stored:
            self._database.write(f"opening study {header.name}", update)
        with storage_errors(f"opening study {header.name}"), garbage_kept():
            study = self._database.attempt(load)
        if study.passed_over:
            those = counted(study.passed_over, "trial")
            self._warn(f"{those} of study {study.name}, added by another program, passed over: no search trained it")
        return study

    def header(self, name: str | None, *, option: str = "--study") -> StudyHeader:
        """Return the header of a study that an option names; None: of the newest.

        Raises:
            InvalidInput: There is no such study.
        """
        known = {header.name: header for header in self.headers()}
        if not known:
            remedy = f"run `python -m pipeline.search`, or name another {self._database.option}"
            raise InvalidInput(self._database.option, [Problem(self.place, f"holds no study; {remedy}")])
        if name is not None and name not in known:
            raise InvalidInput(option, [Problem(name, f"there is no such study; {did_you_mean(name, known)}")])
        return list(known.values())[-1] if name is None else known[name]

    def delete(self, name: str) -> None:
        """Remove a study's folder and trials; the caller holds the study's lock.

        Raises:
            StorageError: Something cannot be removed.
        """
        with storage_errors(f"deleting study {name}"):
            shutil.rmtree(self.folder(name))
        storage = self._database.storage()
        self._database.write(
            f"deleting study {name}",
            lambda: optuna.delete_study(study_name=name, storage=storage),
            arrived=lambda: name not in self._studies(),
        )

    def _folders(self) -> set[str]:
        """Return the names of the studies that have files below the root."""
        parent = study_folder(self.root, "any").parent
        return {path.name for path in parent.iterdir() if is_study_name(path.name)} if parent.is_dir() else set()

    def _is_of_another_record(self, study: str) -> bool:
        """Return whether the files of a study belong to a record that is not this one."""
        folder = study_folder(self.root, study)
        owner = folder / RECORD
        if owner.is_file():
            return owner.read_text() != (self.url or "")
        return self.url is not None and (folder / "best.yaml").exists()

    def refuse_another_record(self, study: str, option: str) -> None:
        """Refuse a study whose folder has the files of another record's study of the same name.

        Raises:
            InvalidInput: It has.
        """
        if self._is_of_another_record(study):
            message = f"{study_folder(self.root, study)} has the files of a study of another record"
            remedy = f"name that record by --storage, or, if it is {self.database.name}, by neither --storage nor "
            remedy += f"{STORAGE}; or name another study, or another --root"
            raise InvalidInput(option, [Problem(study, f"{message}; {remedy}")])

    def folder(self, study: str) -> Path:
        """Return the folder of a study's files: `best.yaml`, checkpoints, lock.

        Raises:
            InvalidInput: The folder, or something in it, is a link.
        """
        folder = study_folder(self.root, study)
        refuse_links(self.root, folder, *folder.rglob("*"))
        return folder

    @contextlib.contextmanager
    def lock(self, study: str) -> Iterator[None]:
        """Hold the exclusive lock of a study; the system releases it when the process ends, even by SIGKILL.

        The lock is a file in the study's folder, and one of the database too if other machines write to it.

        Raises:
            StudyBusy: Another process holds the lock.
            StorageError: The folder cannot be written.
            InvalidInput: The folder, or something in it, is a link.
        """
        path = self.folder(study) / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
        except OSError as error:
            remedy = "make room or permission for it, or name another --root"
            raise StorageError(f"{path}: cannot be written: {error.strerror}; {remedy}") from None
        with file:
            try:
                lock(file.fileno(), path, wait=False)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise StudyBusy(f"study {study} is driven by {holder}; wait for it, or name another --study") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            sweep(path.parent)
            if self.url is not None:
                write_atomic(path.parent / RECORD, self.url)
            with self._database.lock(study):
                yield

    def _studies(self) -> dict[str, Mapping[str, Any]]:
        return self._database.studies() if self._database.exists() else {}


def _database(root: Path, url: str | None, warn: Callable[[str], None]) -> Database:
    if url is None:
        return SqliteDatabase(root, warn=warn)
    from pipeline.study.postgres import PostgresDatabase  # imports the driver, which is an optional extra

    return PostgresDatabase(url, warn=warn)


def _with_defaults(header: StudyHeader) -> Mapping[str, Any]:
    """Return the document of a study's space with the defaults of settings that are newer than the study."""
    try:
        return space_from_document(header.document, name=header.space).document
    except InvalidInput:  # of another version, so that it equals no space of this one
        return header.document


def _as_given(space: SearchSpace) -> Mapping[str, Any]:
    """Return the document of a space with its warm start in place of the configs that the warm start became."""
    if space.warm_start is None:
        return space.document
    return {**space.document, "enqueue": dataclasses.asdict(space.warm_start)}


def _compared(header: StudyHeader, space: SearchSpace) -> dict[str, Any]:
    """Return the document of a study as it is compared with a space: with its warm start, unless the configs agree."""
    document = _with_defaults(header)
    agree = space.warm_start is None and document.get("enqueue") == space.document["enqueue"]
    if header.warm_start is not None and not agree:
        document = {**document, "enqueue": header.warm_start}
    return searched_part(document)


def searched_part(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document without the settings of the confirmation, on which no trial depends."""
    return {key: value for key, value in document.items() if key != "confirm"}


def fingerprint_changes(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yield each part that differs between two fingerprints, and how; nothing if one is not known."""
    if before is None or now is None:
        return
    for part in {**before, **now}:
        if part not in before or part not in now:
            yield part, "is new" if part in now else "is no longer there"
        elif before[part] != now[part]:
            was, does = before[part].rpartition(", "), now[part].rpartition(", ")
            yield part, "has changed" if was[0] == does[0] else f"was {was[0]} and is {does[0]}"


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield a problem for each place at which two documents differ."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    for place in [*before, *(place for place in after if place not in before)]:
        if before.get(place) != after.get(place):
            yield Problem(
                place, f"the study has {before.get(place, 'nothing')}, this search {after.get(place, 'nothing')}"
            )


def _leaves(data: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    else:
        yield place, json.dumps(data)
