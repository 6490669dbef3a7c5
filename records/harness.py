"""A checkpoint as lm-evaluation-harness sees it, for ./run.sh eval --tasks. It needs lm_eval 0.4.13 or newer.

Every text begins as a document does. Log-likelihoods come from packed rows, and what is generated from the
cache, which is exact: tokens skip in both.
"""
from itertools import groupby

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_table
from tqdm import tqdm

import sample
import tool
from tool import UserError


class Checkpoint(TemplateLM):
    def __init__(self, model, rt):
        super().__init__()
        self.model, self.rt, self.cfg = model, rt, model.cfg
        self.encoding = tool.get_encoding(model.cfg)

    @property
    def eot_token_id(self):
        return self.encoding.eot_token

    def tok_encode(self, string, add_special_tokens=None, **_):
        tokens = tool.encode(self.cfg, string)
        return tokens[1:] if add_special_tokens is False else tokens

    def scores(self, rows):
        """(log-likelihood, is it the likeliest?) of the last n tokens of each (tokens, n); as many rows as a
        micro-batch has are packed."""
        T, B = self.cfg.max_seq_len, self.cfg.device_batch_size
        if too_long := [n for _, n in rows if n > T]:
            raise UserError(f"--tasks: an answer has {too_long[0]} tokens, the model sees {T}")
        rows = [(tokens[-T - 1:], n) for tokens, n in rows]
        for i in tqdm(range(0, len(rows), B), "log-likelihoods", disable=None):
            losses, greedy, _ = tool.scores(self.model, self.rt, rows[i:i + B])
            yield from ((-loss.sum().item(), each.all().item()) for loss, each in zip(losses, greedy))

    def _loglikelihood_tokens(self, requests, **_):
        return [*self.scores([(context + end, len(end)) for _, context, end in requests])]

    def loglikelihood_rolling(self, requests, **_):
        found = []
        for request in requests:
            begin, *tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, begin, self.cfg.max_seq_len, 1)
            rows = [(seen + wanted[-1:], len(wanted)) for seen, wanted in windows]
            found.append(sum(score for score, _ in self.scores(rows)))
        return found

    def generate_until(self, requests, **_):
        """Those of the same settings, which follow each other, together, as many as a micro-batch has."""
        found, B = [], self.cfg.device_batch_size
        for _, same in groupby((request.args for request in requests), lambda args: str(args[1])):
            texts, (how, *_) = zip(*same)
            for i in range(0, len(texts), B):
                seed = self.cfg.seed + len(found)  # so that repeats differ
                found += self.continued(texts[i:i + B], seed, **normalize_gen_kwargs(how))
        return found

    def continued(self, texts, seed, until, max_gen_toks, temperature=0.0, top_p=1.0, top_k=None, **_):
        """What follows the end of each text (half of the model's length stays for it), up to any of `until`."""
        T, end = self.cfg.max_seq_len, self.encoding.eot_token
        prompts = [self.tok_encode(text)[-max(T // 2, T - max_gen_toks):] for text in texts]
        with self.rt.autocast():
            rows, _ = sample.generate(self.model, prompts, max_gen_toks, temperature, top_k, top_p, seed, end,
                                      self.encoding.n_vocab)
        for prompt, row in zip(prompts, rows):
            new = sample.pieces([token for token in row[len(prompt):] if token.id != end], self.encoding)
            text = "".join(piece for piece, _ in new)
            for stop in filter(None, until):
                text = text.split(stop)[0]
            yield text


def evaluate(model, rt, tasks, **how):
    """The harness's table of these tasks, names or paths of YAML files with commas between."""
    try:
        config = EvaluatorConfig(tasks=tasks)
        manager = config.process_tasks()
        found = simple_evaluate(Checkpoint(model, rt), tasks=config.tasks, task_manager=manager, **how)
    except (ValueError, OSError) as e:  # no such task, one that asks for a consent, no network
        raise UserError(f"--tasks {tasks}: {e}")
    return make_table(found)
