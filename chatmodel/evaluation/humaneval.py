"""Does the program in a reply pass HumanEval's tests?

Source: karpathy/nanochat tasks/humaneval.py@c75fe54, whose reading of a reply is kept; the programs run in
`chatmodel.execution`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from chatmodel.execution import ExecutionResult, execute_python

CODE_BLOCK = re.compile(r"```(?:python)?\s*\n(.*?)\n```", re.DOTALL)


def build_program(row: Mapping[str, Any], reply: str) -> str:
    """The imports of the question, the reply's code (its first code block, else all of it), the tests, and their call.

    Args:
        row: `prompt`, `test` and `entry_point`.
    """
    block = CODE_BLOCK.search(reply)
    code = (block.group(1) if block else reply).strip()
    return "\n\n".join([leading_imports(row["prompt"]), code, f"{row['test']}\ncheck({row['entry_point']})"])


def leading_imports(prompt: str) -> str:
    """The import lines before the first line that is neither an import nor blank nor a comment."""
    imports = []
    for line in prompt.split("\n"):
        stripped = line.strip()
        if stripped.startswith(("import ", "from ")):
            imports.append(stripped)
        elif stripped and not stripped.startswith("#"):
            break
    return "\n".join(imports)


def run_programs(programs: Sequence[str], *, progress: "tqdm[Any] | None" = None) -> list[ExecutionResult]:
    """How each program ended; as many run side by side as there are cores."""

    def run(program: str) -> ExecutionResult:
        result = execute_python(program)
        if progress is not None:
            progress.update()
        return result

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(run, programs))
