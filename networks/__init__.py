"""Networks that torchvision lacks, and CIFAR stems for torchvision's networks."""
