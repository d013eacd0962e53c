"""The warnings of a run, by their codes: what each means and what to do.

The data room and `training/watch.py` take their advice from here; `ftf explain CODE` and docs/errors.md show all of it.
A warning never stops a run, and its message has the figures.
"""

from __future__ import annotations

from typing import NamedTuple


class Explained(NamedTuple):
    meaning: str
    advice: str


WARNINGS: dict[str, Explained] = {
    # data
    "ROWS_REJECTED": Explained(
        "Rows of the data files cannot be used, or not for this objective, and are left out.",
        "`ftf data check FILE` names each with its reason.",
    ),
    "ROWS_DROPPED": Explained(
        "Training examples are left out while they become tokens, as too long or without anything to learn.",
        "Raise data.max_length, or let data.overlong cut or split; `ftf data preview` shows what becomes of a row.",
    ),
    "ANSWERS_CUT": Explained(
        "Answers are cut off at data.max_length; one that lost its end does not teach the model to stop.",
        "Raise data.max_length (`ftf lint` names the length that holds 99 % of the examples), or shorten or split them.",
    ),
    "TURNS_UNLOCATED": Explained(
        "Assistant turns are empty, or the template writes them so that they cannot be found; they stay out of the loss.",
        "Look at some rows with `ftf data preview`, and choose another data.template if whole answers are missing.",
    ),
    "SPLIT": Explained(
        "The held-out part is too small or too close to the training part for its loss to be more than a rough guide.",
        "Raise data.eval_fraction, add data, or give a file of its own as data.eval.",
    ),
    "NO_EVALUATION": Explained(
        "Nothing is held out that could be measured: no evaluation will show whether the model learned, and the last weights are kept.",
        "Give other or more examples as data.eval; where all are too long, raise data.max_length.",
    ),
    "EVAL_LEAK": Explained(
        "Evaluation examples stand in the training data too, exactly, nearly or by their prompt: the evaluation will look too good.",
        "Remove them from one side, or drop data.eval and let a clean share be held out.",
    ),
    "EVAL_ROWS_DROPPED": Explained(
        "Held-out examples are left out of the evaluation, as too long or without an answer.",
        "Raise data.max_length, or shorten those examples.",
    ),
    "REPLAY_TOO_SMALL": Explained(
        "data.replay holds fewer examples than data.replay_share asks for; all are used once.",
        "Add general data, or lower data.replay_share.",
    ),
    "LENGTH_BIAS": Explained(
        "Chosen answers are on average 1.5 times as long as rejected ones, or the other way round: the model can win by length alone.",
        "Add pairs in which the other length wins, or use simpo or dpo with loss sigmoid_norm, which count tokens out.",
    ),
    "PAIRS_CONTRADICT": Explained(
        "A pair prefers what another pair of the same prompt rejects.",
        "Decide which is meant, or set preference.label_smoothing to the share of wrong labels.",
    ),
    "LABEL_BALANCE": Explained(
        "Good and bad answers, weighted, are not within 1 to 4/3 of each other, where KTO was found to work best.",
        "Set preference.desirable_weight and preference.undesirable_weight as the warning says.",
    ),
    "ONE_LABEL": Explained(
        "All answers are rated good, or all are rated bad: nothing tells the model what to prefer.",
        "Add answers of the other label, or set data.good_rating.",
    ),
    # settings and plan
    "LEARNING_RATE_LOWERED": Explained(
        "The learning rate was one for adapters, with which full fine-tuning forgets what the model knew; a lower one is used.",
        "Set a training.learning_rate that is meant for full fine-tuning: a low value is taken as it is.",
    ),
    "PLAN_FAILED": Explained(
        "Memory and time of the run could not be predicted; the run goes on without a prediction.",
        "`ftf plan run.yaml` shows the reason; watch the memory of the first steps.",
    ),
    # while it learns
    "LEARNING_RATE_ZERO": Explained(
        "The learning rate is 0: nothing is learned.", "Check training.scheduler and training.warmup_ratio."
    ),
    "LOSS_RISING": Explained(
        "The training loss has risen over the last log lines.", "Lower training.learning_rate, or raise training.warmup_ratio."
    ),
    "LOSS_FLAT": Explained(
        "The training loss has stood still over the last log lines.",
        "Raise training.learning_rate, check the data with `ftf data preview`, or stop: it may have learned what it can.",
    ),
    "BOTH_LOGPS_FALLING": Explained(
        "Chosen and rejected answers both become less likely: probability flows to answers nobody preferred (Razin et al. 2024).",
        "Lower training.learning_rate, raise preference.beta, use fewer steps, or an objective that also learns the chosen answer "
        "(orpo, cpo).",
    ),
    "REWARD_MODEL_WEAK": Explained(
        "The reward model tells pairs apart hardly better than a coin: it is no guide for reinforcement learning.",
        "Check that chosen and rejected really differ (`ftf data preview --form pair`), train longer, raise training.learning_rate, or use dpo.",
    ),
    "KL_RUNAWAY": Explained(
        "The policy has moved far from the reference model: rewards beyond this point are often hacked (Gao et al. 2023).",
        "Raise reinforcement.kl_coefficient or set reinforcement.kl_target, lower training.learning_rate, or stop at an earlier checkpoint.",
    ),
    "REWARD_HACKING_LENGTH": Explained(
        "Reward rises with the length of the answers: the model may be paid for writing more, not better.",
        "Add a reward for length (`length:WORDS`), balance the lengths of the preference pairs, or raise reinforcement.kl_coefficient.",
    ),
    "ENTROPY_COLLAPSE": Explained(
        "The policy hardly varies its answers any more: it has little left to compare.",
        "Raise reinforcement.kl_coefficient or reinforcement.entropy_coefficient, lower training.learning_rate, or stop: it may be done.",
    ),
    "VALUE_NOT_LEARNING": Explained(
        "The value head of ppo explains none of the variance of the returns: advantages are as noisy as without it.",
        "Raise reinforcement.value_coefficient, lower training.learning_rate, or use rloo, which needs no value head.",
    ),
    "REWARDS_ALL_EQUAL": Explained(
        "For nearly all prompts every answer gets the same reward: nothing is learned from them.",
        "Use a reward that tells more answers apart, prompts of middling difficulty, more reinforcement.samples_per_prompt, or a higher temperature.",
    ),
    # files of the run
    "CHECKPOINT_UNFINISHED": Explained(
        "A checkpoint was being written when the run ended; it was removed.", "Nothing: the run goes on from the one before."
    ),
    "CHECKPOINT_DAMAGED": Explained(
        "A checkpoint is damaged and was skipped; the run goes on from an older one.",
        "Look at the disk: `ftf doctor` shows its free space. Nothing else is lost than the steps between.",
    ),
    "BEST_CHECKPOINT_DAMAGED": Explained(
        "The checkpoint with the lowest evaluation loss cannot be read, so the last weights are kept.",
        "Compare the evaluation losses with `ftf logs`; if the last is much higher, train again.",
    ),
    "REPORT_FAILED": Explained(
        "The report could not be written or drawn; the run itself has succeeded.", "`ftf export` writes it again."
    ),
    "SINK_DROPPED": Explained(
        "What listened to the run's events failed and gets no more of them; events.jsonl is whole.",
        "`ftf logs` shows what the run reported.",
    ),
}
