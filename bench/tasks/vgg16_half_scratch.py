"""VGG-16-BN of half the width with random weights, and CIFAR-10 JPEG."""

from bench.tasks import Task
from pliant.data import Train

TASK = Task(
    name="vgg16-half-scratch",
    network="vgg16-bn-half",
    prepare=Train(epochs=0, batch=128),
)
