"""Training of each part: one file a part, one shared loop (`loop.TrainingRun`), one data set (`data`)."""
