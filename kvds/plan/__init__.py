"""What a run will take, from configurations alone: memory per GPU, work, time, disk, and what would make it fit."""
