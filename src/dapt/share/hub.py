"""A run directory on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from dapt.errors import UserError, reason_of
from dapt.progress import Reporter
from dapt.run.directory import RunDirectory
from dapt.share.card import model_card


def files_to_push(run: RunDirectory) -> dict[str, bytes | Path]:
    """What of a run goes to the hub, by its name there: its records and results, and its card.

    The checkpoint, which only resuming reads, and TensorBoard's files stay here.

    Raises:
        UserError: no finished run is here, or a file of it is a link.
    """
    run.require()
    kept = sorted({*run.files(), *run.path.glob("eval-*.json")})
    run.check_links(kept)
    return {"README.md": model_card(run).encode(), **{file.name: file for file in kept}}


def push(
    run: RunDirectory, repo_id: str, *, private: bool = False, reporter: Reporter | None = None
) -> str:
    """Upload a run to the model repository ``repo_id``, made if need be, in one commit.

    Args:
        run: a finished run.
        repo_id: such as ``name/flowers``.
        private: who may see the repository, where it is made now.
        reporter: is told the progress.

    Returns:
        The commit's address.

    Raises:
        UserError: no finished run is here, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = files_to_push(run)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api = HfApi(library_name="dapt")
    try:
        with (reporter or Reporter()).stage(f"pushing to {repo_id}", 2) as advance:
            api.create_repo(repo_id, private=private, exist_ok=True)
            advance(1)
            commit = api.create_commit(
                repo_id, operations, commit_message="Run directory of dapt and its model card"
            )
            advance(1)
    except Exception as error:  # the hub's client raises a wide family
        raise UserError(
            f"{run.path} could not be pushed to '{repo_id}' ({reason_of(error)}); check the name "
            "and the connection, and log in with 'hf auth login'"
        ) from error
    return str(commit.commit_url)
