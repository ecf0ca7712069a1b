"""`lamina report`: real models, accelerated and measured, on one page. `job.py` does the work, `page.py` shows it."""
