"""Train, load and attack from Python.

Importing tiny_digits.py registers its data set.
"""

from tiny_digits import TinyDigits

from attacks import PGD
from evaluation import robust_accuracy
from experiment import load_model, train

result = train("tiny_digits.json", overrides={"trainer.epochs": 6}, run_dir="my_run")
print(f"clean: {result['test_top1']:.1%}")

model = load_model("my_run")
attack = PGD(epsilon=8 / 255, step_size=2 / 255, steps=5)
# Any module or function, and any iterable of (images, labels), such as a torch DataLoader
report = robust_accuracy(model, TinyDigits(part="test"), attack)
print(f"under attack: {report.robust_top1:.1%}")
