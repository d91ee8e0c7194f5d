"""A GGUF in llama.cpp, in the environment of its own that has it: numpy is all else that is there."""

from __future__ import annotations

from typing import Any


class LlamaRunner:
    """A GGUF in llama.cpp, through its C functions: a token's only Python is one `llama_decode` call.

    The model is mapped; both thread counts are `threads`; batches of 512; fp16 KV cache (its default).
    Logits are computed where they are read: at the last position, or with `all_logits` at each.
    """

    def __init__(self, spec: dict[str, Any], threads: int) -> None:
        import ctypes

        import llama_cpp as api  # type: ignore[import-not-found]
        import numpy as np

        self.api, self.np, self.ctypes = api, np, ctypes
        self._log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        model = api.llama_model_default_params()
        model.load_mode = api.LLAMA_LOAD_MODE_MMAP
        model.n_gpu_layers = 0
        self.model = api.llama_model_load_from_file(spec["path"].encode(), model)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the GGUF")
        options = api.llama_context_default_params()
        options.n_ctx = spec["context"]
        options.n_batch = options.n_ubatch = self.batch = 512
        options.n_outputs_max = 0 if spec.get("all_logits") else 1
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = int(spec["flash_attention"])
        options.no_perf = True
        self.session = api.llama_init_from_model(self.model, options)
        if not self.session:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = api.llama_get_memory(self.session)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.context = api.llama_n_ctx(self.session)

    def last_logits(self, tokens: list[int], start: int) -> Any:
        """fp32 [vocab], valid until the next call."""
        self.api.llama_memory_seq_rm(self.memory, 0, start, -1)
        for at in range(0, len(tokens), self.batch):
            part = tokens[at : at + self.batch]
            array = (self.api.llama_token * len(part))(*part)
            self._decode(self.api.llama_batch_get_one(array, len(part)))
        return self._row(-1)

    def logits(self, tokens: list[int], start: int) -> Any:
        """fp32 [S, vocab]."""
        self.api.llama_memory_seq_rm(self.memory, 0, start, -1)
        rows = []
        batch = self.api.llama_batch_init(self.batch, 0, 1)
        for at in range(0, len(tokens), self.batch):
            part = tokens[at : at + self.batch]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, start + at + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            self._decode(batch)
            rows += [self._row(i).copy() for i in range(len(part))]
        self.api.llama_batch_free(batch)
        return self.np.stack(rows)

    def reset(self) -> None:
        """Forget the cache."""
        self.api.llama_memory_clear(self.memory, False)

    def close(self) -> None:
        """Free context and model."""
        self.api.llama_free(self.session)
        self.api.llama_model_free(self.model)

    def _decode(self, batch: Any) -> None:
        if code := self.api.llama_decode(self.session, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _row(self, index: int) -> Any:
        row = self.api.llama_get_logits_ith(self.session, index)
        return self.np.ctypeslib.as_array(row, shape=(self.vocab,))
