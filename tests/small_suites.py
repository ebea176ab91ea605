"""The text of a small suite, and settings that make its runs quick and alike on all machines."""

SUITE = """
data: {name: digits, limit: 320}
protocol: {name: quick, epochs: 1, batch_size: 64}
pairs: [[resnet14, resnet8], [resnet14, resnet14]]
distillers: [none, kd, {name: kd, temperature: 1}]
seeds: [0, 1]
teacher: {epochs: 1, allow_weak: true}
"""
QUICK = ["engine.precision=float32", "engine.device=cpu"]
