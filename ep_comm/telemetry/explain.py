"""Who was late, from what the ranks of a failed buffer have left on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = "ep_comm last operations 1"
Document = dict[str, Any]  # what a file holds, and "path"
_NONE = type(None)
_OF_DOCUMENT: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("run", "buffer", "host"), (str,)),
    **dict.fromkeys(("rank", "num_ranks"), (int,)),
    "time": (int, float),
    "error": (dict,),
    "operations": (list, _NONE),
}
_OF_ERROR: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("type", "text"), (str,)),
    "late_ranks": (list,),  # of ranks
    **dict.fromkeys(("op", "phase"), (str, _NONE)),
    "epoch": (int, _NONE),
    "waited_s": (int, float, _NONE),
}
_OF_OPERATION: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "epoch": (int,),
    **dict.fromkeys(("seconds", "called_ago_s"), (int, float, _NONE)),
}


class ExplainError(ValueError):
    """The files do not belong together, or are none of ours; names the one."""


@dataclass(frozen=True)
class RankStory:
    """What one rank has left.

    Attributes:
        path: Its file.
        rank: In the buffer's group.
        host: Where it ran.
        time: When it wrote the file, seconds of the epoch.
        error: Its error: type, text, late_ranks, op, epoch, phase, waited_s.
        operations: Its last operations, oldest first; None where the GPU could not be read.
    """

    path: Path
    rank: int
    host: str
    time: float
    error: dict[str, Any]
    operations: list[dict[str, Any]] | None

    @property
    def late_ranks(self) -> tuple[int, ...]:
        """The ranks that it waited for in vain."""
        return tuple(self.error["late_ranks"])

    @property
    def waits_in(self) -> str:
        """The operation and phase in which it waited; empty where it did not."""
        if not self.error["op"]:
            return ""
        return f"{self.error['op']} #{self.error['epoch']} (phase: {self.error['phase']})"

    @property
    def last(self) -> dict[str, Any] | None:
        """Its last operation that was complete, where that is known.

        The one that failed stands behind it, if it was recorded at all.
        """
        done = [
            op
            for op in self.operations or []
            if op["seconds"] is not None
            and (op["op"], op["epoch"]) != (self.error["op"], self.error["epoch"])
        ]
        return done[-1] if done else None

    @property
    def last_end_ago_s(self) -> float | None:
        """Seconds between the end of `last` and the file; None where that is not known."""
        last = self.last
        if last is None or last["called_ago_s"] is None:
            return None
        return max(0.0, last["called_ago_s"] - (last["seconds"] or 0.0))


@dataclass(frozen=True)
class Story:
    """All that the files tell.

    Attributes:
        num_ranks: Ranks of the buffer's group.
        ranks: What each has left, by rank; some may be missing.
        culprits: The ranks that others waited for and that waited for nobody themselves.
        sentences: What happened, most important first.
    """

    num_ranks: int
    ranks: dict[int, RankStory]
    culprits: tuple[int, ...]
    sentences: tuple[str, ...]


def read_story(paths: Iterable[Path]) -> Story:
    """Read the files of one failed buffer.

    Raises:
        OSError: A file cannot be read.
        Others as `read_document` and `tell`.
    """
    return tell(map(read_document, paths))


def tell(documents: Iterable[Document]) -> Story:
    """Return what the files of one failed buffer tell.

    Raises:
        ExplainError: A file is of another run or buffer than the first; or two are of the same
            rank; or there is none.
    """
    ranks: dict[int, RankStory] = {}
    first: Document = {}
    for document in documents:
        path = document["path"]
        first = first or document
        for name, what in (("run", "run"), ("buffer", "buffer of the run")):
            if document[name] != first[name]:
                raise ExplainError(
                    f"{path} is of another {what} than {first['path']}: {document[name]}, not "
                    f"{first[name]}"
                )
        if document["rank"] in ranks:
            raise ExplainError(
                f"{path} and {ranks[document['rank']].path} are both of rank {document['rank']}"
            )
        ranks[document["rank"]] = RankStory(
            path,
            document["rank"],
            document["host"],
            document["time"],
            document["error"],
            document["operations"],
        )
    if not ranks:
        raise ExplainError("no files: name those that the errors of the ranks give")
    num_ranks = first["num_ranks"]
    culprits = find_culprits(ranks)
    sentences = _sentences(ranks, culprits, num_ranks)
    return Story(num_ranks, dict(sorted(ranks.items())), culprits, tuple(sentences))


def newest_fault(documents: Iterable[Document]) -> tuple[list[Document], int]:
    """Return the files of the last fault among these, and how many faults there are."""
    faults: dict[tuple[str, str], list[Document]] = {}
    for document in documents:
        faults.setdefault((document["run"], document["buffer"]), []).append(document)
    last = max(faults.values(), key=lambda files: max(f["time"] for f in files), default=[])
    return last, len(faults)


def find_culprits(ranks: dict[int, RankStory]) -> tuple[int, ...]:
    """Return the ranks that others waited for and that waited for nobody themselves."""
    waited_for = {late for story in ranks.values() for late in story.late_ranks}
    waiting = {rank for rank, story in ranks.items() if story.late_ranks}
    return tuple(sorted(waited_for - waiting))


def read_document(path: Path) -> Document:
    """Read what one rank has left.

    Raises:
        ExplainError: The file is none of ours.
        OSError: It cannot be read.
    """
    try:
        document = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExplainError(f"{path} is no file that ep_comm has left: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ExplainError(f'{path} is no file that ep_comm has left: "format" is not {FORMAT!r}')
    _check_fields(path, document, _OF_DOCUMENT)
    _check_fields(path, document["error"], _OF_ERROR)
    if any(type(rank) is not int for rank in document["error"]["late_ranks"]):
        raise ExplainError(f'{path} is damaged: "late_ranks" are no ranks')
    for operation in document["operations"] or []:
        _check_fields(path, operation, _OF_OPERATION)
    return {**document, "path": path}


def _check_fields(path: Path, found: object, wanted: dict[str, tuple[type, ...]]) -> None:
    for name, kinds in wanted.items():
        if not isinstance(found, dict) or not isinstance(found.get(name, ...), kinds):
            raise ExplainError(f'{path} is damaged: "{name}" is missing or no value of its kind')


def _sentences(
    ranks: dict[int, RankStory], culprits: Sequence[int], num_ranks: int
) -> Iterable[str]:
    for culprit in culprits:
        waiters = [story for story in ranks.values() if culprit in story.late_ranks]
        first = max(waiters, key=lambda story: (story.error["waited_s"] or 0.0, -story.time))
        since = f" for {first.error['waited_s']:g} s" if first.error["waited_s"] else ""
        yield (
            f"Rank {culprit} was late: {_names(s.rank for s in waiters)} waited for it{since} in "
            f"{first.waits_in}."
        )
        yield _what_it_did(culprit, ranks.get(culprit), first)
    if not culprits and any(story.late_ranks for story in ranks.values()):
        yield (
            "The ranks waited for one another: they called different operations, or in another "
            "order. Compare their last operations."
        )
    for rank, story in sorted(ranks.items()):
        if not story.error["op"]:
            yield f"Rank {rank} failed with {story.error['type']}: {story.error['text']}"
    missing = [rank for rank in range(num_ranks) if rank not in ranks and rank not in culprits]
    if missing:
        yield f"Of {_names(missing)} there is no file here."


def _what_it_did(rank: int, story: RankStory | None, waiter: RankStory) -> str:
    if story is None:
        return (
            f"It has left no file: its process has ended or stands still outside of ep_comm, or "
            f"the file is not among these. Look for the end of rank {rank}'s output."
        )
    last, ago = story.last, story.last_end_ago_s
    if last is None:
        return "It had begun no operation of the buffer, or its GPU could not be read."
    when = "" if ago is None else f", which was done {ago:.1f} s before it wrote its file"
    called = {(op["op"], op["epoch"]) for op in story.operations or []}
    behind = ""
    if (waiter.error["op"], waiter.error["epoch"]) not in called:
        behind = f" It never called {waiter.error['op']} #{waiter.error['epoch']}."
    return f"Its last complete operation was {last['op']} #{last['epoch']}{when}.{behind}"


def _names(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    return f"rank {listed[0]}" if len(listed) == 1 else f"ranks {', '.join(map(str, listed))}"
