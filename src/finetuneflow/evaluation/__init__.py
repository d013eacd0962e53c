"""Measuring: loss, scores, samples, acceptance suites, and whether one model is better than another.

losses.py      loss, perplexity, token accuracy over supervised tokens           (torch)
scores.py      exact match, token F1, BLEU, ROUGE
questions.py   prompts with expected answers, out of examples
samples.py     answers in batches, resumable; samples to show
judges.py      what a suite can ask of an answer
suite.py       acceptance prompts in YAML
preferences.py pairs told apart, by log-probability or by a reward model
rewards.py     what reinforcement pays for: built-in, own functions, reward models
reward_model.py  a model that scores answers                                     (torch)
statistics.py  paired bootstrap, sign test, verdict
compare.py     A against B, and what was forgotten
measure.py     `evaluate`: all of one model, into one file
"""
