"""Plan: what a run will take, from configurations alone: memory per GPU, work, time, disk, and what makes it fit."""
