"""What a looped model does from loop to loop, measured: `rmse-probe`, and what its figures mean."""
