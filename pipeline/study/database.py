"""Database: the record of ended trials, in a file of SQLite or in a PostgreSQL server, with Optuna's tables."""

from __future__ import annotations

import contextlib
import gc
import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import optuna
import sqlalchemy.exc
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models  # Optuna's own interface writes a transaction per attribute, or per trial
from optuna.study.study import _SYSTEM_ATTR_METRIC_NAMES
from optuna.trial import FrozenTrial
from sqlalchemy import insert, text
from sqlalchemy.orm import Session

from pipeline.errors import StorageError
from pipeline.space.search_space import Objective
from pipeline.study.stored_trial import NUMBER, OWN_TRIAL

T = TypeVar("T")
COUNT = f"""
SELECT studies.study_name, COUNT(DISTINCT COALESCE(number.value_json, CAST(trials.trial_id AS VARCHAR)))
FROM studies
JOIN trials ON trials.study_id = studies.study_id
JOIN trial_user_attributes AS own ON own.trial_id = trials.trial_id AND own.key = '{OWN_TRIAL}'
LEFT JOIN trial_user_attributes AS number ON number.trial_id = trials.trial_id AND number.key = '{NUMBER}'
GROUP BY studies.study_name
"""
"""Counts a copy of a trial once; trials of earlier versions have no number."""


class Database(ABC):
    """Optuna's database, to which one search of a study writes at a time."""

    name: str
    """Names the database in messages."""
    option: str
    """The option that names another database."""
    interrupted: Callable[[], bool] = staticmethod(lambda: False)
    """Says whether to stop waiting for the database."""

    @abstractmethod
    def exists(self) -> bool:
        """Return whether the database has Optuna's tables, or must have them."""

    @abstractmethod
    def storage(self, *, create: bool = False) -> RDBStorage:
        """Open the database, after creating it if asked to.

        Raises:
            InvalidInput: The database cannot be used.
            StorageError: The database cannot be opened now.
        """

    @abstractmethod
    def attempt(self, action: Callable[[], T]) -> T:
        """Return what an action returns that reads the database; it may be called again after the database was away."""

    @abstractmethod
    def write(self, doing: str, action: Callable[[], object], *, arrived: Callable[[], bool] | None = None) -> None:
        """Call an action that changes the database.

        Args:
            doing: Begins the message of an error.
            action: Called again after the database was away.
            arrived: Asked before an action is called again: whether the database did all of it, but could not say so.
                None: calling the action twice is as good as once.

        Raises:
            StorageError: The database cannot be written, or what is written would be lost.
        """

    @abstractmethod
    def lock(self, study: str) -> contextlib.AbstractContextManager[None]:
        """Hold a lock of a study that programs on other machines respect.

        Raises:
            StudyBusy: Another program holds the lock.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the database."""

    @abstractmethod
    def usable(self) -> contextlib.AbstractContextManager[None]:
        """Turn an error of the block, which reads the database, into one with a remedy."""

    def studies(self) -> dict[str, Mapping[str, Any]]:
        """Return the user attributes of every study by its name, including other programs' studies."""
        # Optuna's summaries would read every trial of every study.
        return self._read(lambda storage: {study.study_name: study.user_attrs for study in storage.get_all_studies()})

    def count_trials(self) -> dict[str, int]:
        """Return the number of trials that searches have stored, by study; other programs' trials do not count."""

        def count(storage: RDBStorage) -> dict[str, int]:
            with storage.engine.connect() as connection:
                return {name: count for name, count in connection.execute(text(COUNT))}

        return self._read(count)

    def create_study(self, study: str, objective: Objective, attrs: Mapping[str, Any]) -> None:
        """Create a study with its user attributes in one transaction; called within `write`."""
        direction = optuna.study.StudyDirection[objective.direction.upper()]
        metric = models.StudySystemAttributeModel(
            key=_SYSTEM_ATTR_METRIC_NAMES, value_json=json.dumps([objective.metric])
        )
        with Session(self.storage().engine) as session, session.begin():
            session.add(
                models.StudyModel(
                    study_name=study,
                    directions=[models.StudyDirectionModel(objective=0, direction=direction)],
                    user_attributes=[
                        models.StudyUserAttributeModel(key=key, value_json=json.dumps(value))
                        for key, value in attrs.items()
                    ],
                    system_attributes=[metric],  # for Optuna's own tables and plots
                )
            )

    def add_trials(self, study_id: int, trials: Sequence[FrozenTrial]) -> None:
        """Add ended trials in one transaction, as Optuna's `add_trial` adds each; called within `write`."""
        with Session(self.storage().engine) as session, session.begin():
            # Other programs that add a trial wait here (PostgreSQL) or at the first insertion (SQLite).
            models.StudyModel.find_or_raise_by_id(study_id, session, for_update=True)
            rows = [
                models.TrialModel(
                    study_id=study_id,
                    state=trial.state,
                    datetime_start=trial.datetime_start,
                    datetime_complete=trial.datetime_complete,
                )
                for trial in trials
            ]
            session.add_all(rows)
            session.flush()
            for number, row in enumerate(rows, rows[0].count_past_trials(session)):
                row.number = number
            for model, columns in _COLUMNS.items():
                pairs = zip(rows, trials, strict=True)
                if values := [{"trial_id": row.trial_id, **one} for row, trial in pairs for one in columns(trial)]:
                    session.execute(insert(model), values)

    def _read(self, action: Callable[[RDBStorage], T]) -> T:
        with self.usable():
            storage = self.storage()
            return self.attempt(lambda: action(storage))


def _params(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for name, distribution in trial.distributions.items():
        value = distribution.to_internal_repr(trial.params[name])
        yield {"param_name": name, "param_value": value, "distribution_json": distribution_to_json(distribution)}


def _values(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    if trial.value is not None:
        value, kind = models.TrialValueModel.value_to_stored_repr(trial.value)
        yield {"objective": 0, "value": value, "value_type": kind}


def _intermediate_values(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for step, reported in trial.intermediate_values.items():
        value, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(reported)
        yield {"step": step, "intermediate_value": value, "intermediate_value_type": kind}


def _user_attrs(trial: FrozenTrial) -> Iterator[dict[str, Any]]:
    for key, value in trial.user_attrs.items():
        yield {"key": key, "value_json": json.dumps(value)}


_COLUMNS: Mapping[Any, Callable[[FrozenTrial], Iterator[dict[str, Any]]]] = {
    models.TrialParamModel: _params,
    models.TrialValueModel: _values,
    models.TrialIntermediateValueModel: _intermediate_values,
    models.TrialUserAttributeModel: _user_attrs,
}
"""Table of a trial's parts to the columns of each of its rows."""

NEWER_OPTUNA = f"Optuna {optuna.__version__} does not know them; install the Optuna that made them"
"""What to do about tables of a later version of Optuna."""


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Pause Python's garbage collection, which takes as long as reading where a hundred thousand objects stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


STORAGE_ERRORS = (
    optuna.exceptions.StorageInternalError,
    sqlalchemy.exc.SQLAlchemyError,
    sqlite3.Error,
    OSError,
    json.JSONDecodeError,
)
"""What a storage raises that is broken, locked, or changed by another program."""


@contextlib.contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn any error of a storage into a StorageError."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise StorageError(f"{doing}: {_root_cause(error)}") from error
    except AssertionError as error:  # an assertion in Optuna's `finally` hides the cause
        raise StorageError(f"{doing}: {_root_cause(error)}") from error


def _root_cause(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error) or type(error).__name__
