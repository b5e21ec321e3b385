"""Push models that are in memory; and what ``push_to_hub`` of a packed model is.

The ``push_to_hub`` of transformers and diffusers writes an empty card, and there is no hook in it. A packed model
therefore carries one of its own, with their arguments. It refers to the model weakly, so that this is freed as ever.
"""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_lowbit.hf.hub import Pushed

_NAME = "push_to_hub"


class OfModel:
    """A function that one packed model carries in place of its class's own."""

    def __init__(self, model: Any) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy along with the model: the copy belongs to the copied model."""
        return type(self), (self._model(),)

    def model(self) -> Any:
        """Return the model.

        Raises:
            ValueError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ValueError(f"the model that this {type(self).__name__} belongs to is gone")
        return model


class PushToHub(OfModel):
    """``push_to_hub`` of one packed model; called like that of transformers or diffusers."""

    def __call__(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        *,
        commit_description: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        base_model: str | None = None,
        license: str | None = None,
        language: Sequence[str] | None = None,
        results: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        **others: Any,
    ) -> Any:
        """Publish the model with its card in one commit; another model in the repository is replaced.

        Args:
            repo_id: user/name, or a name alone, which is yours.
            commit_message: first line of the commit.
            private: make the repository private, if it is made.
            token: None takes that of ``hf auth login`` or ``HF_TOKEN``.
            create_pr: propose it as a pull request.
            commit_description: of the commit, below its first line.
            revision: branch; None for the main one.
            max_shard_size: largest weight file.
            tags: further ones for the card.
            base_model: dense model on the Hub; None takes where the model was loaded from.
            license: None takes that of the base model on the Hub.
            language: codes, for the card.
            results: what ``hf-lowbit eval --json`` printed.
            tokenizer: pushed along, unless None.
            others: further arguments of the libraries; refused unless they ask for nothing.

        Returns:
            :class:`hf_lowbit.hf.hub.Pushed`. Of a model with an adapter inside, transformers pushes the adapter alone;
            then what it returns.

        Raises:
            ValueError, CheckpointError, HubError: as :func:`hf_lowbit.hf.hub.push_folder`.
        """
        from hf_lowbit.hf.card import CardFields

        model = self.model()
        if getattr(model, "_hf_peft_config_loaded", False):
            return type(model).push_to_hub(
                model,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=[*(tags or ())],
            )
        asked = [name for name, value in others.items() if value not in (None, True if "safe" in name else False)]
        if asked:
            raise ValueError(
                f"push_to_hub of a packed model takes no {', '.join(asked)}; files are safetensors, at the top"
            )
        fields = CardFields(base_model, license, tuple(language or ()), tuple(tags or ()))
        own = token if isinstance(token, str) else None
        return push_model(
            model,
            _whole_name(repo_id, own),
            tokenizer,
            fields,
            results=results,
            private=private,
            create_pr=create_pr,
            revision=revision,
            replace=True,
            message=commit_message,
            description=commit_description,
            token=own,
            max_shard_size=max_shard_size,
        )


def _whole_name(repo: str, token: str | None) -> str:
    """Return user/name; both libraries take a name alone for one of the user's own repositories."""
    if not isinstance(repo, str) or "/" in repo or not repo:
        return repo
    from huggingface_hub import HfApi, get_token

    from hf_lowbit.errors import HubError
    from hf_lowbit.hf.hub_errors import LOG_IN, plain_errors

    if not (token or get_token()):
        raise HubError(f"{repo}: no token to push with; {LOG_IN}")
    with plain_errors(repo):
        return f"{HfApi(token=token).whoami()['name']}/{repo}"


def offer_push(model: Any) -> None:
    """Give a packed model a ``push_to_hub`` that writes its card."""
    setattr(model, _NAME, PushToHub(model))


def withdraw_push(model: Any) -> None:
    """Take it away again: the model is dense now, and its library's own is right for that."""
    model.__dict__.pop(_NAME, None)


def push_model(
    model: Any,
    repo: str,
    tokenizer: Any = None,
    fields: Any = None,
    *,
    max_shard_size: int | str | None = None,
    **how: Any,
) -> Pushed:
    """Publish a compressed model, or a pipeline with compressed models, that is in memory.

    Args:
        model: of transformers or diffusers, or a pipeline of diffusers.
        repo: user/name.
        tokenizer: pushed with it, unless None.
        fields: :class:`hf_lowbit.hf.card.CardFields`; without a base model, it is where the model was loaded from.
        max_shard_size: largest weight file; None for 5 GB.
        how: as :func:`hf_lowbit.hf.hub.push_folder` takes it.

    Raises:
        ValueError, CheckpointError, HubError: as :func:`hf_lowbit.hf.hub.push_folder`.
    """
    from hf_lowbit.hf.card import CardFields
    from hf_lowbit.hf.hub import check_repo_id, push_folder
    from hf_lowbit.hf.save import save_model

    check_repo_id(repo)
    fields = fields or CardFields()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / repo.rpartition("/")[2]
        if hasattr(model, "components"):  # a pipeline of diffusers
            model.save_pretrained(target)
        else:
            report = getattr(getattr(model, "hf_quantizer", None), "report", None)
            record = _record(model, report)
            fields = dataclasses.replace(fields, base_model=fields.base_model or record.get("base_model"))
            rows = None if report is None else report.rows
            save_model(model, target, tokenizer, rows, max_shard_size=max_shard_size or "5GB", record=record or None)
        return push_folder(target, repo, fields, **how)


def _record(model: Any, report: Any) -> dict[str, Any]:
    """Return the record of the run: of the one just made, else of the folder that the model was loaded from."""
    from hf_lowbit.hf.record import read_record, run_record

    config = getattr(model, "config", None)
    source = getattr(config, "_name_or_path", None)
    if report is not None:
        return run_record(source, report.seconds)
    return read_record(Path(source)) if source and Path(source).is_dir() else {}
