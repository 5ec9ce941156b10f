"""Plans which input file is upscaled to which output file, and finds problems before any work."""

import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from uplift_diffusers.console import CommandError
from uplift_diffusers.images.files import INPUT_SUFFIXES, OUTPUT_FORMATS, find_image_files
from uplift_diffusers.saving import check_output_path
from uplift_diffusers.wording import reason

_MAX_NAME_BYTES = 255
"""Longest file name in bytes, if the system does not report it."""


@dataclass(frozen=True)
class Task:
    """One image file to upscale."""

    source: Path
    target: Path


@dataclass
class Plan:
    """
    The planned work.

    Args:
        tasks: in order, each with a different output.
        problems: a message on every input that cannot be read or has no valid output.
        left_out: number of files below the input folders that are not images, by suffix.
    """

    tasks: list[Task] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def is_batch(inputs: list[str]) -> bool:
    """Whether the outputs go into a folder, and a problem with one file does not affect the others."""
    return len(inputs) > 1 or os.path.isdir(inputs[0])


def plan_tasks(inputs: list[str], output: str) -> Plan:
    """
    Plan the outputs of all inputs. Nothing is written.

    Args:
        inputs: files and folders.
        output: a file or a folder, as described in `upscale --help`.
    Raises:
        CommandError: an input is missing, `output` is not of the right kind, an output would replace an input, or
            a single input has a problem (with several inputs, `problems` lists them).
    """
    if not output:
        raise CommandError("--output must be a file or a folder, got an empty name.")
    for source in inputs:
        if not os.path.exists(source):
            raise CommandError(f"{source}: no such file or folder.")
    batch, target = is_batch(inputs), Path(output)
    is_folder = os.path.isdir(target) or output.endswith(("/", os.sep))
    plan = Plan()
    if not batch and not is_folder:
        if target.suffix.lower() not in OUTPUT_FORMATS:
            known = ", ".join(OUTPUT_FORMATS)
            raise CommandError(
                f"--output must end in {known} or be a folder, got {output}. Write {output}/ for a new folder."
            )
        tasks = [Task(Path(inputs[0]), target)]
    else:
        if not os.path.isdir(target) and os.path.lexists(target):
            raise CommandError(f"--output must be a folder, got the file {output}.")
        if not is_folder and target.suffix.lower() in INPUT_SUFFIXES:
            raise CommandError(
                f"--output must be a folder for several inputs or a folder, got {output}. "
                f"Write {output}/ if a folder of that name is meant."
            )
        tasks = [task for source in inputs for task in _tasks_below(Path(source), target, plan)]
    once = {_key(task.source): task for task in reversed(tasks)}  # of an input that was named twice
    tasks = _name_apart(list(reversed(once.values())), plan)
    _check_no_input_is_replaced(tasks)
    for task in tasks:
        if problem := _problem_of_target(task.target):
            plan.problems.append(f"{task.source}: {problem}")
        else:
            plan.tasks.append(task)
    if plan.problems and not batch:
        raise CommandError(plan.problems[0].removeprefix(f"{inputs[0]}: "))
    return plan


def _tasks_below(source: Path, folder: Path, plan: Plan) -> list[Task]:
    """The files of an input and their outputs. Two outputs may have the same name."""
    if not os.path.isdir(source):
        return [Task(source, _in_output_format(folder / source.name))]
    inside_itself = folder.resolve() != source.resolve()  # an output folder below its input is no input
    found = find_image_files(source, leave_out=folder if inside_itself else None)
    if not found.files and not found.problems:
        raise CommandError(f"{source}: no images in this folder.")
    plan.problems += [f"{path}: {problem}" for path, problem in found.problems]
    plan.left_out.update(found.left_out)
    return [Task(file, _in_output_format(folder / file.relative_to(source))) for file in found.files]


def _in_output_format(path: Path) -> Path:
    return path if path.suffix.lower() in OUTPUT_FORMATS else path.with_suffix(".png")


def _name_apart(tasks: list[Task], plan: Plan) -> list[Task]:
    """
    The tasks with distinct outputs.

    If several inputs would become the same file, those that change their suffix keep it in the name: with a.png
    present, a.gif becomes a.gif.png. Inputs with the same name from different folders are problems.
    """
    counts = Counter(_key(task.target) for task in tasks)
    renamed = [
        Task(task.source, task.target.with_name(f"{task.source.name}.png"))
        if counts[_key(task.target)] > 1 and task.source.suffix.lower() not in OUTPUT_FORMATS
        else task
        for task in tasks
    ]
    sources: dict[str, list[Path]] = {}
    for task in renamed:
        sources.setdefault(_key(task.target), []).append(task.source)
    for first, *others in sources.values():
        if others:
            plan.problems.append(f"{first}: would become the same file as {others[0]}. Upscale them one by one.")
        for other in others:
            plan.problems.append(f"{other}: would become the same file as {first}. Upscale them one by one.")
    return [task for task in renamed if len(sources[_key(task.target)]) == 1]


def _key(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path))


def _check_no_input_is_replaced(tasks: list[Task]) -> None:
    inputs = {_identity(task.source) for task in tasks} - {None}
    for task in tasks:
        if _identity(task.target) in inputs:
            raise CommandError(f"{task.target} is an input and would be replaced. Name another --output.")


def _identity(path: Path) -> tuple[int, int] | None:
    """An identity of a file that is the same for links to it and for other spellings of its name; None if missing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _problem_of_target(target: Path) -> str | None:
    """A message if an output cannot be written or must not be replaced, regardless of flags."""
    if too_long := _name_too_long(target):
        return too_long
    try:
        check_output_path(target, overwrite=True)
    except NotADirectoryError:  # reported when the folder is made
        return None
    except OSError as error:
        return f"the output {target} cannot be written: {reason(error)}"
    return None


def _name_too_long(target: Path) -> str | None:
    there = next((folder for folder in target.absolute().parents if os.path.isdir(folder)), None)
    limit = _MAX_NAME_BYTES
    if there is not None and hasattr(os, "pathconf"):
        with suppress(OSError, ValueError):  # of a file system that does not say
            limit = os.pathconf(there, "PC_NAME_MAX")
    longest = max(target.parts, key=lambda part: len(os.fsencode(part)), default="")
    if len(os.fsencode(longest)) > limit:
        return f"the output's name is too long: {limit} bytes are allowed, {longest[:40]}... has more."
    return None
