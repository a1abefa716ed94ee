"""What is planned of models that were saved: to be asked, served, written anew, combined."""
